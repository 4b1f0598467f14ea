"""The engine's choice among ways to run a convolution: every way runs, and the fastest is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from fastres import tuning
from fastres.block import Block, Norm, autotune, make_plan
from fastres.block.plan import Context, ConvPlan, Plan, conv_options
from fastres.kernels import BACKENDS
from fastres.testing import BlockCase, FunctionalBlock

pytestmark = pytest.mark.gpu


_ACTS = ("relu", "relu", "none", "none")


def _block(backend: str, device: str, **changes: Any) -> tuple[Block, Context, torch.Tensor]:
    case = BlockCase("tuned", shortcut="projection", stride=2)
    module = FunctionalBlock.of(case.stock(device))
    *units, side = [module.layer(i)._replace(act=act).layer.unit for i, act in enumerate(_ACTS)]
    spec = Block(
        tuple(units), "input", side, act="relu", backend=backend, save=True, memory="balanced"
    )
    weights = tuple((*conv.weight.shape,) for conv in module.convs)
    signature = Context(device, torch.float32, True, weights)
    return spec._replace(**changes), signature, case.input(device=device)


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[tuning.Problem]:
    """Stands for the tuner: runs every candidate once and takes the last."""
    seen: list[tuning.Problem] = []

    def choose(
        problem: tuning.Problem, candidates: Sequence[Any],
        run: Callable[[Any], Callable[[], object]], *, device: torch.device,
        name: Callable[[Any], str] = str, prepare: tuning.Prepare | None = None,
    ) -> Any:  # fmt: skip
        assert len({name(c) for c in candidates}) == len(candidates), "names tell them apart"
        thunks = [run(candidate) for candidate in candidates]
        if prepare is not None:
            prepare(thunks)
        for thunk in thunks:
            thunk()
        seen.append(problem)
        return candidates[-1]

    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(autotune, "_tuned", {})
    return seen


def _tuned(spec: Block, signature: Context, x: torch.Tensor) -> Plan:
    return autotune.tuned_plan(spec, signature, make_plan(spec, signature), x)


@pytest.mark.parametrize("changes", [{}, {"memory": "speed"}], ids=str)
def test_every_way_runs_and_the_chosen_is_taken(
    changes: dict[str, Any], problems: list[tuning.Problem], device: str
) -> None:
    spec, signature, x = _block("triton", device, **changes)
    options = conv_options(spec, signature)
    assert [[o.level for o in found] for found in options] == [["c'", "b'", "b", "c"]] * 4
    plan = _tuned(spec, signature, x)
    assert plan.level == "c"
    kinds = [p.kernel for p in problems if p.kernel.startswith("unit/")]
    assert kinds == ["unit/forward", "unit/backward"] * 4
    state = torch.random.get_rng_state()
    count = len(problems)
    assert _tuned(spec, signature, x) is plan, "chosen once"
    assert len(problems) == count
    assert _tuned(spec, signature, x[:2]) is not plan, "another size is another problem"
    assert torch.equal(state, torch.random.get_rng_state()), "the user's random numbers stay"


def test_a_backend_prepares_all_ways_together(
    problems: list[tuning.Problem], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []
    watched = replace(BACKENDS["triton"], prepare=lambda thunks: prepared.append(len(thunks)))
    monkeypatch.setitem(BACKENDS, "triton", watched)
    spec, signature, x = _block("triton", device)
    _tuned(spec, signature, x)
    assert prepared == [4, 4] * 4, "forward and backward of four convolutions, four levels each"


def test_a_choice_is_of_its_kernels_and_of_torch_s_switches(
    problems: list[tuning.Problem], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured with other kernels, or another precision, says nothing."""
    spec, signature, x = _block("triton", device)
    _tuned(spec, signature, x)
    first, count = problems[0], len(problems)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    _tuned(spec, signature, x)
    assert problems[count].sizes != first.sizes
    monkeypatch.setattr(autotune, "_tuned", {})
    monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], source=lambda: "edited"))
    _tuned(spec, signature, x)
    assert problems[2 * count].sizes == problems[count].sizes
    assert problems[2 * count].source != problems[count].source


def test_nothing_is_made_for_a_choice_that_is_not_measured(device: str) -> None:
    """Random numbers cannot be seeded while a CUDA graph is captured."""
    spec, signature, x = _block("triton", device)
    plan = make_plan(spec, signature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "_tuned", {})
        patch.setattr(tuning, "choose", lambda problem, candidates, run, **_: candidates[0])
        patch.setattr(torch, "Generator", None)
        assert autotune.tuned_plan(spec, signature, plan, x) == plan


def test_forward_and_backward_are_chosen_apart(device: str) -> None:
    spec, signature, x = _block("triton", device)
    options = conv_options(spec, signature)[0]
    by_kind = {"unit/forward": options[1], "unit/backward": options[3]}
    found: list[ConvPlan] = []

    def choose(problem: tuning.Problem, candidates: Any, run: Any, **_: Any) -> ConvPlan:
        return by_kind[problem.kernel]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "choose", choose)
        site = autotune._sites(spec, signature, x)[0]
        assert site is not None
        found.append(autotune._best(make_plan(spec, signature), options, site, x.device))
    (best,) = found
    assert best.stats and best.prologue is None, "forward of b'"
    assert best.joint is options[3].joint, "backward of c"
    assert best.level == "b'"


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [({"save": False}, "unit/infer"), ({"save": False, "batch": True}, "unit/forward")], ids=str,
)  # fmt: skip
def test_what_does_not_run_is_not_measured(
    changes: dict[str, Any], kernel: str, problems: list[tuning.Problem], device: str
) -> None:
    batch = changes.pop("batch", False)
    spec, signature, x = _block("triton", device, **changes)
    norm = Norm(1e-2, "batch" if batch else "running")
    units = tuple(unit._replace(norm=norm) for unit in spec.all_units)
    spec = spec._replace(units=units[:3], projection=units[3])
    assert all(len(options) > 1 for options in conv_options(spec, signature))
    _tuned(spec, signature, x)
    assert {p.kernel for p in problems if p.kernel.startswith("unit/")} == {kernel}


def test_ways_that_are_alike_are_one(device: str) -> None:
    """In NCHW Triton's convolutions decline: what is left at every level is torch's."""
    spec, signature, _ = _block("auto", device)
    found = conv_options(spec, signature._replace(device="cuda", here=False, channels_last=False))
    assert [len(options) for options in found] == [1] * 4


def test_auto_takes_no_unproven_convolution_unmeasured(device: str) -> None:
    """On a GPU cuDNN's convolutions stand until the autotuner has measured something faster."""
    assert not BACKENDS["triton"].proven
    spec, signature, _ = _block("auto", device)
    found = make_plan(spec, signature._replace(device="cuda", here=False))
    assert found.level == "b"
    assert all(c is not None and c.forward.backend == "aten" for c in found.convs)
    around = "cuda" if find_spec("fastres._cuda") else "triton"
    assert {e.backend for e in found.pointwise.values()} == {around}
    options = conv_options(spec, signature._replace(device="cuda", here=False))
    assert [o.level for o in options[0]] == ["b", "c'", "b'", "c"]
    assert [o.infer.backend for o in options[0]] == [around, "triton", "triton", "triton"]


@pytest.mark.parametrize("level", ["b", "b'", "c'", "c"])
def test_at_a_level_auto_takes_unproven_convolutions_for_what_they_fuse(
    level: str, device: str
) -> None:
    spec, signature, _ = _block("auto", device, level=level)
    for found in make_plan(spec, signature._replace(device="cuda", here=False)).convs:
        assert found is not None
        fusing = {found.forward.backend, found.infer.backend}
        assert fusing == {"triton"} if level != "b" else "triton" not in fusing
        assert (found.data.backend, found.weight.backend) == ("aten", "aten")
        assert (found.joint is not None) is (level in ("c'", "c"))


def test_a_level_that_was_asked_for_is_not_tuned(
    problems: list[tuning.Problem], device: str
) -> None:
    spec, signature, x = _block("triton", device, level="b'")
    plan = make_plan(spec, signature)
    assert autotune.tuned_plan(spec, signature, plan, x) is plan
    assert not problems
