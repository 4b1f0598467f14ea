"""What comes from outside: activations, extensions found by entry points, the example, its docs."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres import functional
from fastres.block import Block, Norm, Unit, decode, use_backend, use_memory
from fastres.cli.errors import CommandError
from fastres.functional import ConvNorm
from fastres.kernels import (
    BACKENDS,
    Backend,
    Conv,
    Gate,
    Request,
    activation,
    activations,
    declare,
    extension,
    implementations,
    reference,
    register,
    register_activation,
    registry,
    select,
)
from fastres.kernels.activation import BUILT_IN
from fastres.kernels.extension import Discovery, Extension
from fastres.testing import CASES, check_activation, check_block, check_implementation

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "fastres-mish"
BACKENDS_HERE = [name for name, b in BACKENDS.items() if b.why_not() is None]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """What a test registers ends with it."""
    before = {key: list(entries) for key, entries in registry._TABLE.items()}
    acts, backends = dict(reference.ACTIVATIONS), dict(BACKENDS)
    yield
    for table, contents in (
        (registry._TABLE, before), (reference.ACTIVATIONS, acts), (BACKENDS, backends),
    ):  # fmt: skip
        table.clear()
        table.update(contents)  # type: ignore[arg-type]


def mish_derivative(v: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(v))
    return t + v * torch.sigmoid(v) * (1 - t * t)


def relu3_(v: Tensor) -> Tensor:
    return F.hardtanh(v, 0.0, 3.0)


KNOWN = {"mish": F.mish, "relu3": relu3_, "relu": F.relu}


@pytest.fixture
def mish() -> None:
    register_activation("mish", F.mish, mish_derivative, slope=1.09, curvature=0.65)


@pytest.fixture
def relu3() -> None:
    """Another one whose derivative can be read off the output."""
    register_activation(
        "relu3", relu3_, lambda v: ((v > 0) & (v < 3)).to(v.dtype),
        gate=lambda out: (out > 0) & (out < 3),
    )  # fmt: skip


# ---------------------------------------------------------------- activations


def test_taken_and_impossible_names_are_refused(mish: None) -> None:
    with pytest.raises(ValueError, match="activation 'mish' is already registered"):
        register_activation("mish", F.mish, mish_derivative)
    with pytest.raises(ValueError, match="activation 'relu' is already registered"):
        register_activation("relu", F.relu, F.relu)
    for name in ("a/b", "a;b", "a:b", "", "1"):
        with pytest.raises(ValueError, match="name must be an identifier, got"):
            register_activation(name, F.mish, mish_derivative)


def test_unknown_names_are_refused_with_the_known_ones(mish: None) -> None:
    assert activations() == (*BUILT_IN, "mish")
    known = f"act must be one of {', '.join(activations())}, got 'tanh'"
    x, w = torch.randn(2, 3, 4, 4), torch.randn(3, 3, 1, 1)
    mean, var = torch.zeros(3), torch.ones(3)
    unit = Unit(None, Norm(1e-5), "relu")
    calls: list[Callable[[], object]] = [
        lambda: activation("tanh"),
        lambda: reference.activate(x, "tanh"),
        lambda: functional.bn_act(x, mean, var, training=True, act="tanh"),
        lambda: functional.conv_bn_act(x, w, mean, var, training=True, act="tanh"),
        lambda: functional.residual_block(x, [ConvNorm(w, mean, var, training=True)], act="tanh"),
        lambda: functional.residual_block(x, [ConvNorm(w, act="tanh"), ConvNorm(w)]),
        lambda: Block((unit,), act="tanh").encode(),
        lambda: Block((unit._replace(act="tanh"),)).encode(),
        lambda: decode(Block((unit,), act="relu").encode().replace("relu", "tanh")),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=known):
            call()
    # Nothing was run: the running statistics are as they were.
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


def test_a_specification_carries_any_registered_name(mish: None) -> None:
    unit = Unit(Conv(), Norm(1e-5), "mish")
    spec = Block((unit, unit._replace(act="none")), act="mish")
    assert decode(spec.encode()) == spec


@pytest.mark.parametrize("name", ["mish", "relu3"])
def test_formulas_agree(name: str, mish: None, relu3: None) -> None:
    check_activation(name)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"derivative": torch.sigmoid}, "derivative must be that of forward"),
        ({"derivative": lambda v: v * torch.nan}, "derivative must be that of forward, got nan"),
        ({"slope": 1.05}, "slope must bound"),
        ({"curvature": 0.4}, "curvature must bound"),
        ({"gate": lambda out: out > 0}, "slope must bound"),
        (
            {
                "forward": F.relu,
                "derivative": lambda v: (v > 0).to(v.dtype),
                "gate": lambda out: out >= 0,
            },
            "gate must be the derivative",
        ),
        ({"forward": lambda v: F.mish(v.float()).double()}, "derivative must be that of forward"),
        (
            {"derivative": lambda v: mish_derivative(v.double())},
            "formulas must keep torch.float32 .2, 3., got torch.float64",
        ),
    ],
)
def test_formulas_that_disagree_are_found(changes: dict[str, Any], complaint: str) -> None:
    made = {"forward": F.mish, "derivative": mish_derivative, "slope": 1.09, "curvature": 0.65}
    register_activation("wrong", **{**made, **changes})
    with pytest.raises(AssertionError, match=f"activation 'wrong': {complaint}"):
        check_activation("wrong")


def test_a_gate_cannot_be_read_off_a_smooth_activation(mish: None) -> None:
    grad = y = torch.randn(2, 3, 4, 4)
    stats = torch.ones(5, 3)
    with pytest.raises(ValueError, match="act must be one whose derivative is 0 or 1, got 'mish'"):
        reference.scale_shift_act(y, stats, act="mish", want_mask=True, channels_last=False)
    for kind in ("mask", "out"):
        with pytest.raises(ValueError, match=f"gate must be affine for 'mish', got {kind}"):
            reference.act_backward(grad, Gate(kind, y, "mish"), channels_last=False)


def test_every_implementation_is_held_to_it(mish: None, relu3: None) -> None:
    """Formulas have it, kernels that do not know it say so."""
    case = next(c for c in CASES if c.conv is not None)
    for entry in implementations():
        if entry.backend not in BACKENDS_HERE:
            continue
        outcome = check_implementation(entry, case)
        acted = [label for label in outcome.ran if "mish" in label]
        if entry.backend == "cpu":
            refused = [r for label, r in outcome.declined.items() if "mish" in label]
            assert not acted and all("'mish' has no CPU kernel" in r for r in refused)
    (formula,) = implementations("scale_shift_act", "aten")
    ran = check_implementation(formula, case).ran
    assert {"alone, mish", "in place, mish", "mask, relu3", "residual, relu3"} <= set(ran)
    assert "residual, mish" not in ran


@pytest.mark.parametrize("primitive", ["scale_shift_act", "bn_act_backward_apply"])
def test_a_wrong_one_is_found(primitive: str, mish: None) -> None:
    """An implementation that claims Mish and computes something near it."""

    def near(first: Tensor, *args: Any, **more: Any) -> Any:
        more["channels_last"] = first.is_contiguous(memory_format=torch.channels_last)
        if primitive == "scale_shift_act":
            # x*tanh(softplus(1.001*x)), within 1e-3 of Mish.
            v = first * args[0][3].view(1, -1, 1, 1) + args[0][4].view(1, -1, 1, 1)
            return v * torch.tanh(F.softplus(1.001 * v)), None
        result = reference.bn_act_backward_apply(first, *args, **more)
        result[0][0].mul_(1.0001)
        return result

    only = lambda request: None if request.act == "mish" else "Mish only"  # noqa: E731
    register(primitive, "aten", why_not=only, name="near")(near)
    (entry,) = (e for e in implementations(primitive, "aten") if e.name == "near")
    case = next(c for c in CASES if c.values == "normal" and c.dtype == torch.float32)
    with pytest.raises(AssertionError, match=r"aten:near .* is off by"):
        check_implementation(entry, case)


# ---------------------------------------------------------------- blocks


class StockUnit(nn.Module):
    """[convolution +] batch norm + activation out of torch's modules."""

    def __init__(self, act: str, conv: bool) -> None:
        super().__init__()
        self.act = act
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False) if conv else None
        self.norm = nn.BatchNorm2d(6)
        nn.init.normal_(self.norm.weight, 1, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x if self.conv is None else self.conv(x))
        return KNOWN[self.act](z)


class FusedUnit(StockUnit):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.training:
            norm.num_batches_tracked.add_(1)
        running = (norm.running_mean, norm.running_var)
        more: dict[str, Any] = {"training": self.training, "act": self.act}
        if self.conv is None:
            return functional.bn_act(x, *running, norm.weight, norm.bias, **more)
        weight = self.conv.weight
        return functional.conv_bn_act(
            x, weight, *running, norm.weight, norm.bias, padding=1, **more
        )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("conv", [False, True], ids=["norm", "conv"])
@pytest.mark.parametrize("act", ["mish", "relu3"])
@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_unit_is_torchs(
    backend: str, act: str, conv: bool, training: bool, mish: None, relu3: None
) -> None:
    stock, fused = (kind(act, conv).train(training) for kind in (StockUnit, FusedUnit))
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)
    with use_backend(backend):
        check_block(stock, fused, x.requires_grad_())


class StockBlock(nn.Module):
    """Two convolutions with `inner` between them, `outer` after the identity shortcut."""

    def __init__(self, inner: str, outer: str) -> None:
        super().__init__()
        self.acts = (inner, outer)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner, outer = (KNOWN[name] for name in self.acts)
        z = inner(self.norms[0](self.convs[0](x)))
        return outer(self.norms[1](self.convs[1](z)) + x)


class FusedBlock(StockBlock):
    def layers(self) -> list[ConvNorm]:
        return [
            ConvNorm(
                c.weight, n.running_mean, n.running_var, n.weight, n.bias, padding=1,
                training=self.training, act=self.acts[0], counter=n.num_batches_tracked,
            )
            for c, n in zip(self.convs, self.norms, strict=True)
        ]  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return functional.residual_block(x, self.layers(), act=self.acts[1])


@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
@pytest.mark.parametrize("acts", [("mish", "relu"), ("mish", "relu3"), ("relu", "mish")], ids=str)
def test_block_is_torchs(acts: tuple[str, str], memory: str, mish: None, relu3: None) -> None:
    """Also with two activations, of which the backend's kernels know one."""
    stock, fused = StockBlock(*acts), FusedBlock(*acts)
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)
    with use_memory(memory):
        check_block(stock, fused, x.requires_grad_())


def test_compiles_whole(mish: None) -> None:
    def run(x: Tensor) -> Tensor:
        return functional.bn_act(x, None, None, training=True, act="mish")

    x = torch.randn(2, 3, 4, 4)
    found = torch.compile(run, backend="eager", fullgraph=True)(x)
    assert torch.equal(found, run(x))


# ---------------------------------------------------------------- discovery


def discovering(monkeypatch: pytest.MonkeyPatch, **modules: Callable[[], object]) -> Discovery:
    """A discovery that finds these extensions; importing one calls its function."""

    class Found(EntryPoint):
        def load(self) -> Any:
            return modules[self.name]()

    entries = [Found(name, f"package.{name}", extension.GROUP) for name in modules]
    monkeypatch.setattr(extension, "entry_points", lambda group: entries)
    monkeypatch.delenv("FASTRES_EXTENSIONS", raising=False)
    return Discovery((registry._TABLE, reference.ACTIVATIONS))


def test_each_is_imported_once_in_the_order_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    load = discovering(monkeypatch, b=lambda: seen.append("b"), a=lambda: seen.append("a"))
    assert load() == (Extension("a", "package.a", None), Extension("b", "package.b", None))
    assert load() is load() and seen == ["a", "b"]


def test_a_broken_one_warns_once_and_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        register("add_act", "aten", name="half")(print)
        register("add_act", "new", name="half")(print)
        register_activation("half", F.mish, mish_derivative)
        raise ModuleNotFoundError("No module named 'gone'")

    def fine() -> None:
        register("add_act", "aten", name="fine")(print)

    load = discovering(monkeypatch, one=broken, two=fine)
    with pytest.warns(RuntimeWarning, match=r"'one' \(package.one\) is left out: Module.*'gone'"):
        one, two = load()
    assert one.error == "ModuleNotFoundError: No module named 'gone'" and two.error is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load()
    names = {str(entry) for entry in implementations("add_act")}
    assert "aten:fine" in names and not {"aten:half", "new:half"} & names
    assert "half" not in activations()


def test_an_interrupt_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    load = discovering(monkeypatch, one=interrupted)
    with pytest.raises(KeyboardInterrupt):
        load()


def test_one_may_ask_the_registry_while_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def asks() -> None:
        seen.append(load())
        request = Request("cpu", torch.float32, True)
        seen.append(str(select("add_act", ("aten",), request)[0]))

    load = discovering(monkeypatch, one=asks)
    monkeypatch.setattr(registry, "load_extensions", load)
    assert load() == (Extension("one", "package.one", None),)
    assert seen == [(), "aten:formula"]


def test_threads_wait_until_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    count: list[int] = []

    def slow() -> None:
        begun.set()
        assert go.wait(20)
        count.append(1)

    load = discovering(monkeypatch, one=slow)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(load()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    assert found == []
    go.set()
    for thread in threads:
        thread.join(20)
    assert found == [1] * 4 and count == [1]


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    load = discovering(monkeypatch, one=lambda: pytest.fail("imported"))
    monkeypatch.setenv("FASTRES_EXTENSIONS", "0")
    assert load() == ()
    load = discovering(monkeypatch, one=lambda: None)
    monkeypatch.setenv("FASTRES_EXTENSIONS", "yes")
    with pytest.raises(ValueError, match="FASTRES_EXTENSIONS must be 0 or 1, got 'yes'"):
        load()
    monkeypatch.setenv("FASTRES_EXTENSIONS", "1")
    assert len(load()) == 1


def test_an_implementation_must_accept_every_request() -> None:
    knows = lambda *acts: lambda r: None if r.act in acts else f"no {r.act}"  # noqa: E731
    register("add_act", "mine", why_not=knows("none"), name="a")(print)
    register("add_act", "mine", why_not=knows("none", "relu"), name="b")(print)
    asked = [Request("cpu", torch.float32, True, act) for act in ("none", "relu")]
    found, reasons = select("add_act", ("mine",), *asked)
    assert str(found) == "mine:b" and reasons == ["mine:a: no relu"]


def test_a_backend_of_its_own_can_be_asked_for() -> None:
    calls: list[str] = []

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(more["act"])
        return reference.scale_shift_act(*args, **more, channels_last=False, acc=torch.float32)

    declare(Backend("mine", ("cpu",), why_not=lambda: None, fallback=("aten",)))
    register("scale_shift_act", "mine")(counted)
    x = torch.randn(2, 3, 4, 4)
    with use_backend("mine"):
        out = functional.bn_act(x, None, None, training=True)
    assert calls == ["relu"]
    torch.testing.assert_close(out, F.relu(F.batch_norm(x, None, None, training=True)))


# ---------------------------------------------------------------- installed packages


def describe(site: Path, project: str, name: str, module: str) -> None:
    """What pip would leave beside a package that names one module."""
    info = site / f"{project.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fastres.extensions]\n{name} = {module}\n")


def install(site: Path, name: str, code: str) -> None:
    """A package of one module."""
    (site / f"{name}.py").write_text(code)
    describe(site, name, name, name)


def python(*arguments: str, site: Path, limit: float = 300, **variables: str) -> Any:
    """A fresh process that finds what is installed in `site`."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("FASTRES_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
        **variables,
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=site, capture_output=True, text=True,
        check=False, timeout=limit,
    )  # fmt: skip


FIRST_BLOCK = """
import sys, torch, fastres
assert "ours" not in sys.modules and "broken" not in sys.modules, "import fastres imports them"
x = torch.randn(2, 3, 4, 4)
for _ in range(2):
    try:
        fastres.functional.bn_relu(x, None, None, training=True)
    except ValueError as error:
        print(error)
print("ours" in sys.modules, [tuple(e) for e in fastres.kernels.load_extensions()])
"""

OURS = """
import torch
from fastres.kernels import Backend, declare
from fastres.kernels import register_activation

declare(Backend("ours", ("cpu",), why_not=lambda: None, fallback=("aten",)))
register_activation("tanh", torch.tanh, lambda v: 1 - torch.tanh(v) ** 2)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    install(tmp_path, "ours", OURS)
    install(tmp_path, "broken", "import a_module_that_is_gone")
    return tmp_path


def test_the_first_block_imports_what_is_installed(site: Path) -> None:
    done = python("-c", FIRST_BLOCK, site=site)
    error = "ModuleNotFoundError: No module named 'a_module_that_is_gone'"
    expected = [("broken", "broken", error), ("ours", "ours", None)]
    assert done.stdout.strip() == f"True {expected}", done.stderr
    assert done.stderr.count("fastres extension 'broken' (broken) is left out") == 1


def test_switched_off_nothing_is_imported(site: Path) -> None:
    done = python("-c", FIRST_BLOCK, site=site, FASTRES_EXTENSIONS="0")
    assert (done.stdout.strip(), done.stderr) == ("False []", "")


def test_a_wrong_switch_is_an_error_at_the_first_block(site: Path) -> None:
    done = python("-c", FIRST_BLOCK, site=site, FASTRES_EXTENSIONS="on")
    complaint = "FASTRES_EXTENSIONS must be 0 or 1, got 'on'"
    assert done.stdout.splitlines() == [complaint, complaint]
    assert complaint in done.stderr.splitlines()[-1]


def test_names_of_an_extension_are_known_without_importing_it(site: Path) -> None:
    code = (
        "import torch, fastres\n"
        "with fastres.use_backend('ours'):\n"
        "    out = fastres.functional.bn_act(torch.randn(2, 3, 4, 4), None, None, training=True,"
        " act='tanh')\n"
        "print(bool(out.abs().max() < 1))"
    )
    done = python("-W", "ignore", "-c", code, site=site)
    assert done.stdout.strip() == "True", done.stderr


def test_doctor_lists_extensions(site: Path) -> None:
    run = "from fastres.cli import doctor; doctor.main({})"
    found = json.loads(python("-c", run.format(["--json"]), site=site).stdout)
    assert [e["name"] for e in found["extensions"]] == ["broken", "ours"]
    assert "ours" in [backend["name"] for backend in found["backends"]]
    text = " ".join(python("-c", run.format([]), site=site).stdout.split())
    assert "Extensions broken broken ModuleNotFoundError: No module named" in text
    assert "ours ours imported" in text
    wrong = python("-c", run.format([]), site=site, FASTRES_EXTENSIONS="7")
    assert "FASTRES_EXTENSIONS must be 0 or 1, got '7'" in " ".join(wrong.stdout.split())


# ---------------------------------------------------------------- the example


def _can_build() -> bool:
    """Whether pip and a setuptools that knows today's pyproject.toml are here.

    Not looked for as modules: setuptools' import hooks would take pip for running, and nothing in
    this process could import setuptools any more.
    """
    try:
        distribution("pip")
        return int(distribution("setuptools").version.partition(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built and installed into a folder of its own; laid out there without pip."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    source = tmp_path_factory.mktemp("source") / "fastres-mish"
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    if not _can_build():
        shutil.copytree(source / "fastres_mish", site / "fastres_mish")
        entries = tomllib.loads((source / "pyproject.toml").read_text())["project"]["entry-points"]
        ((name, module),) = entries["fastres.extensions"].items()
        describe(site, "fastres-mish", name, module)
        return site
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--target", str(site), str(source)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return site


def own_tests(installed: Path, *options: str, **variables: str) -> int:
    """How many of the example's tests pass, with the package where it was installed."""
    common = ["-o", "addopts=", "-p", "no:cacheprovider", "--rootdir", str(installed)]
    done = python("-m", "pytest", *common, *options, str(EXAMPLE / "tests"), site=installed,
                  limit=500, **variables)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return int(re.findall(r"(\d+) passed", done.stdout)[0])


@pytest.mark.exhaustive
def test_its_own_tests_pass_in_the_interpreter(installed: Path) -> None:
    assert own_tests(installed, TRITON_INTERPRET="1") >= 24


def test_its_kernels_compile_without_spills(installed: Path) -> None:
    assert own_tests(installed, "-k", "spills") == 3


@pytest.mark.grid(3)
@pytest.mark.parametrize(
    "primitive", ["scale_shift_act", "bn_act_backward_reduce", "bn_act_backward_apply"]
)
def test_its_rows_are_in_the_benchmark(primitive: str, installed: Path, tmp_path: Path) -> None:
    done = python(
        "-m", "bench", "kernel", "--quick", "--device", "cpu", "--backend", "triton",
        "--primitive", primitive, "--csv", str(tmp_path / "rows.csv"),
        site=installed, TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a smoke test and not a measurement" in done.stderr
    with (tmp_path / "rows.csv").open() as file:
        own = [row for row in csv.DictReader(file) if "mish" in row["subject"]]
    assert own and all(row["subject"].startswith(f"{primitive}, ") for row in own)
    assert {row["contender"] for row in own} == {f"triton:{primitive}"}


#: The autotuner as if there were a GPU, with a clock that likes the third candidate best.
TUNED = """
import torch
from contextlib import contextmanager
from types import SimpleNamespace
from fastres import tuning
from fastres.kernels.triton import launch
from fastres.functional import bn_act
from fastres.tuning import measure
import fastres

gpu = torch.device("cuda", 0)
found = SimpleNamespace(name="Fake", major=9, minor=0, L2_cache_size=1)
torch.cuda.get_device_properties = lambda device: found
torch.cuda.current_device = lambda: 0
torch.cuda.is_current_stream_capturing = lambda: False
launch.interpreted = lambda: False
choose, seen, times = tuning.choose, {}, {}

def pretend(problem, candidates, run, *, device, name=str, prepare=None):
    seen[problem.kernel] = [problem.source, len(candidates)]
    times.clear()
    def prepared(candidate):
        run(candidate)()
        rank = candidates.index(candidate)
        return lambda: abs(rank - 2) + 1.0
    best = choose(problem, candidates, prepared, device=gpu, name=name)
    seen[problem.kernel].append(candidates.index(best))
    return best

@contextmanager
def clock(device):
    yield lambda thunk: thunk()

tuning.choose, measure.gpu_timer = pretend, clock
x = torch.randn(4, 64, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
with fastres.use_backend("triton"):
    bn_act(x, None, None, training=True, act="mish").sum().backward()
print(sorted((k, v[1] > 2, v[2]) for k, v in seen.items()))
kept = tuning.kept(gpu)
print(sorted(p.kernel for p in kept if any("fastres_mish.mish.mish_" in str(s) for s in p.sizes)))
"""


def test_the_autotuner_tunes_its_kernels(installed: Path, tmp_path: Path) -> None:
    done = python("-c", TUNED, site=installed, TRITON_INTERPRET="1",
                  FASTRES_CACHE_DIR=str(tmp_path))  # fmt: skip
    kernels = [
        "bn_act_apply_bwd_kernel", "bn_act_reduce_bwd_kernel", "scale_shift_act_fwd_kernel",
    ]  # fmt: skip
    tuned, kept = done.stdout.splitlines()
    assert all(str((kernel, True, 2)) in tuned for kernel in kernels), done.stderr
    assert kept == str(kernels)


def test_nothing_in_fastres_knows_it() -> None:
    for folder in ("fastres", "triton_kernels", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            assert "fastres_mish" not in file.read_text(), file


# ---------------------------------------------------------------- the benchmark


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench.registry with tiny shapes."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import registry as found

    monkeypatch.setattr(found, "SIZES", ((8, 4),))
    monkeypatch.setattr(found, "SCALE", {"cpu": (2, torch.float32)})
    monkeypatch.setattr(found, "FLUSH_BYTES", 1 << 10)
    return found


def kernels(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and result of `fastres bench kernel` on the CPU; {} where none was written."""
    from bench.command import main

    line = ("kernel", "--device", "cpu", "--no-report", "--out", str(out), *arguments)
    status = main(line)
    files = list(out.glob("*.json"))
    return status, json.loads(files[0].read_text()) if files else {}


def test_a_run_is_written_to_a_new_file(bench: Any, tmp_path: Path) -> None:
    status, found = kernels(tmp_path, "--primitive", "scale_shift_act", "--rounds", "3")
    assert status == 0
    assert {"date", "cpu", "torch", "fastres", "commit", "threads"} <= found.keys()
    rows = {(r["contender"], r["subject"]): r for r in found["rows"]}
    assert {name for name, _ in rows} >= {"aten:formula"}
    assert not any(name.startswith("reference") for name, _ in rows)
    row = rows["aten:formula", "scale_shift_act, residual, relu, 2x8x4x4"]
    activation_bytes = 2 * 8 * 4 * 4 * 4
    # y, the residual and the output, and stats [5, 8] in float32.
    assert row["bytes"] == 3 * activation_bytes + 5 * 8 * 4
    assert row["rounds"] == 3 and row["low"] <= row["ms"] <= row["high"]
    assert row["share"] == pytest.approx(row["bound_ms"] / row["ms"]) and row["share"] > 0


def test_only_what_is_needed_counts_as_read(bench: Any) -> None:
    from bench.traffic import bytes_of
    from fastres.testing import BENCH_CASES, Case, calls

    case = Case("bytes", (2, 8, 4, 4))
    # This backend hands its sums over in float64.
    one, stats, sums = 2 * 8 * 4 * 4 * 4, 5 * 8 * 4, 3 * 8 * 8
    (entry,) = implementations("bn_act_backward_apply", "aten")
    found = {
        call.label: bytes_of("bn_act_backward_apply", call, entry.run(*call.args, **call.kwargs))
        for call in calls("bn_act_backward_apply", case, "aten")
    }
    mask = 2 * 8 * 4 * 4 // 8
    assert found["mask"] == 3 * one + mask + stats + sums
    assert found["mask, running statistics"] == 2 * one + mask + stats + sums
    assert found["affine, running statistics"] == 3 * one + stats + sums
    assert found["two branches (False, True)"] == 3 * one + mask + 2 * stats + sums
    conv = bench.cases_of("conv_forward", "cpu", quick=False)
    assert [c.name for c in conv] == [c.name for c in BENCH_CASES if c.dtype == torch.float32]
    assert {c.shape[0] for c in conv} == {2}


def test_what_fails_parity_gets_no_time(bench: Any, tmp_path: Path) -> None:
    def wrong(x: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, None]:
        return x.clone(), None

    register("add_act", "aten", name="wrong")(wrong)
    status, found = kernels(tmp_path, "--quick", "--primitive", "add_act")
    assert status == 1
    refused = [row for row in found["rows"] if row["contender"] == "aten:wrong"]
    assert [row["dtype"] for row in refused] == ["float32", "bfloat16"]
    assert all(r["ms"] is None and "AssertionError" in r["parity"] for r in refused)
    assert any(row["contender"] == "aten:formula" and row["ms"] for row in found["rows"])


def test_what_declines_says_why(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.command import main

    only = lambda request: "not today"  # noqa: E731
    declare(Backend("mine", ("cpu",), why_not=lambda: None))
    register("add_act", "mine", why_not=only, name="shy")(print)
    arguments = ["--quick", "--primitive", "add_act", "--backend", "mine"]
    assert kernels(tmp_path, *arguments) == (1, {})
    assert capsys.readouterr().err.splitlines() == [
        "declined: add_act mine:shy: not today", "nothing was measured, nothing is written"
    ]  # fmt: skip
    with pytest.raises(CommandError, match=r"--backend: backend must be one of auto, .*'nobody'"):
        main(["kernel", "--backend", "nobody"])


# ---------------------------------------------------------------- the document


def test_every_block_of_code_is_the_examples_own() -> None:
    """What docs/extending.md shows of the example stands so in its files."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    files = [EXAMPLE / "pyproject.toml", *EXAMPLE.rglob("*.py")]
    sources = [file.read_text(encoding="utf-8") for file in files]
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        assert any(block in source for source in sources), block


def test_the_document_names_what_exists() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / "docs" / path).resolve().exists(), path
    for name in re.findall(r"`(fastres(?:\.\w+)+)`", text):
        target: Any = fastres
        for part in name.split(".")[1:]:
            __import__(".".join(name.split(".")[:-1])) if not hasattr(target, part) else None
            target = getattr(target, part)
