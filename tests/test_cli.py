"""The command line: what it prints, what it refuses and how."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastres import cli
from fastres.cli import doctor
from fastres.cli.environment import VARIABLES
from fastres.kernels.cuda.archs import covering

ROOT = Path(__file__).resolve().parent.parent


def fastres(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastres.cli", *arguments],
        check=False, capture_output=True, text=True, timeout=180, env={**os.environ, **environment},
    )  # fmt: skip


def needs(*packages: str) -> None:
    """Skip where one is not installed; one that is installed but broken is no excuse."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence on stderr of a command that exits with 2."""
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


# ---------------------------------------------------------------- the command itself


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed and text in printed for name, text in cli.COMMANDS.items())


def test_help_imports_no_torch() -> None:
    """What the command line itself does; `import fastres` is replaced by an empty package."""
    code = f"""
import sys, types
sys.modules["fastres"] = package = types.ModuleType("fastres")
package.__path__ = [{str(Path(cli.__file__).parent.parent)!r}]
package.__version__ = "0"
from fastres.cli import main
try:
    main(["--help"])
except SystemExit:
    sys.exit("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["doctor", "--nope"], ["explain"]])
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: fastres" in capsys.readouterr().err


def test_version() -> None:
    from fastres import __version__

    assert fastres("--version").stdout == f"fastres {__version__}\n"


def test_interrupt_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "collect", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "fastres doctor: interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m fastres.cli doctor | true"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""


# ---------------------------------------------------------------- doctor


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"]
    assert {b["name"] for b in facts["backends"]} >= {"aten", "cpu", "reference", "triton"}
    for backend in facts["backends"]:
        assert backend["available"] == (backend["why_not"] is None)
    assert [e["name"] for e in facts["environment"]] == [v.name for v in VARIABLES]
    for module in facts["modules"]:
        assert module["present"] or (module["why_not"] and module["remedy"])


def test_doctor_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for title in ("Versions", "Compiled modules", "Backends", "CPU", "GPU", "Environment"):
        assert title in printed


def test_doctor_says_how_to_get_a_missing_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fastres._cpu", None)
    assert cli.main(["doctor"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "missing" in printed
    assert "install a C++20 compiler" in printed


def test_doctor_says_what_the_cuda_kernels_were_built_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And, for each GPU, what of it runs there."""
    kernels = SimpleNamespace(archs=lambda: "80;90a", toolkit=lambda: "13.0.88")
    monkeypatch.setitem(sys.modules, "fastres._cuda", kernels)
    gpus = [{"name": n, "capability": c, "memory": 2**30} for n, c in (("A", "9.0"), ("B", "12.0"))]
    monkeypatch.setattr(doctor, "_gpu", lambda: {"devices": gpus, "why_not": None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = doctor.collect()
    assert facts["cuda"] == {"archs": "80;90a", "toolkit": "13.0.88", "devices": ["sm_90a", None]}
    doctor._show(facts)
    printed = " ".join(capsys.readouterr().out.split())
    assert "built for 80;90a by nvcc 13.0.88 A runs sm_90a B not covered; reinstall" in printed
    assert "FASTRES_CUDA_ARCHS=120" in printed


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80;90a;100+PTX", (7, 5), None),
        ("80;90a;100+PTX", (8, 9), "sm_80"),
        ("80;90a;100+PTX", (9, 0), "sm_90a"),
        ("80;90a;100+PTX", (10, 3), "sm_100"),
        ("80;90a;100+PTX", (12, 0), "PTX of compute_100"),
        ("80+PTX;90a", (12, 0), "PTX of compute_80"),
        ("89;90a+PTX", (8, 6), None),
        ("89;90a+PTX", (10, 0), None),
    ],
)
def test_what_runs_on_a_gpu(archs: str, capability: tuple[int, int], runs: str | None) -> None:
    assert covering(archs, capability) == runs


def test_doctor_reports_a_wrong_environment() -> None:
    done = fastres("doctor", FASTRES_BACKEND="cuba")
    assert done.returncode == 0
    assert "backend must be one of" in done.stdout
    assert "got 'cuba'" in done.stdout


def test_doctor_needs_no_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["doctor"]) == 0
    assert "Backends" in capsys.readouterr().out


def test_openmp_runtime_is_torchs_own() -> None:
    """Two runtimes in one process would each start their threads."""
    pytest.importorskip("fastres._cpu")
    done = fastres("doctor", "--json")
    assert json.loads(done.stdout)["cpu"]["openmp_shared_with_torch"] in (True, None)


# ---------------------------------------------------------------- explain


def test_explain_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "resnet18", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["unfused"] == 0
    assert len([r for r in report["rows"] if r["name"].startswith("layer")]) == 8


@pytest.mark.parametrize(
    ("name", "package", "blocks"),
    [
        ("torchvision:resnet50", "torchvision", 16),
        ("timm:resnet50d", "timm", 16),
        ("transformers:ResNetConfig", "transformers", 16),
        ("wide_resnet50_2", "torchvision", 16),
        ("resnet26t", "timm", 8),
        ("ResNetConfig", "transformers", 16),
        ("torchvision:fcn_resnet50", "torchvision", 16),
    ],
)
def test_explain_model_of_a_zoo(name: str, package: str, blocks: int) -> None:
    needs(package)
    done = fastres("explain", name, "--json")  # afresh: in its own process it repairs torchvision
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["blocks"] == [blocks, blocks]


def test_explain_what_anybody_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module of the working directory, and a function of it."""
    code = "import fastres\n\ndef build():\n    return fastres.BasicBlock(4, 4)\n\nnone = int\n"
    (tmp_path / "of_mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", "of_mine:build"]) == 0
    assert "1 of 1 residual blocks" in capsys.readouterr().out
    assert "must build a torch.nn.Module" in refused(capsys, "explain", "of_mine:none")
    assert "has no attribute 'no'" in refused(capsys, "explain", "of_mine:no")
    assert str(tmp_path) not in sys.path


def test_explain_local_model_folder(tmp_path: Path) -> None:
    needs("transformers")
    config = {"model_type": "resnet", "depths": [1], "hidden_sizes": [8], "embedding_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = fastres("explain", f"transformers:{tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "transformers.ResNetModel" in done.stdout


def test_explain_obeys_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--backend", "aten", "--dtype", "bfloat16", "--no-channels-last", "--json"]
    assert cli.main(["explain", "resnet18", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    names = {name for row in rows for name in row["backends"].values()}
    assert names
    assert all(name.startswith("aten:") for name in names)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("rasnet50", "package.module:callable, got 'rasnet50'; the nearest are resnet50"),
        ("nowhere:resnet50", "nowhere:resnet50 must build a model without arguments, got Module"),
        (":resnet50", "MODEL must be a name, LIBRARY:NAME or package.module:callable, got"),
        ("transformers:no/such/folder", "or a local folder or config.json, got 'no/such/folder'"),
    ],
)
def test_explain_refuses(model: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refused(capsys, "explain", model)


def test_explain_refuses_a_missing_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in refused(capsys, "explain", "timm:resnet50")


def test_explain_notes_that_a_backend_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from fastres.kernels import BACKENDS

    absent = replace(BACKENDS["cpu"], why_not=lambda: "it is not there")
    monkeypatch.setitem(BACKENDS, "cpu", absent)
    assert cli.main(["explain", "resnet18", "--backend", "cpu"]) == 0
    assert "backend 'cpu' cannot run here: it is not there" in capsys.readouterr().out


def test_explain_shows_a_gpu_s_kernels_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "resnet50", "--backend", "triton", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    for kernel in (
        "conv_forward            triton:implicit_gemm",
        "conv_backward           triton:grad_formed",
        "bn_act_backward_reduce  triton:bn_act_backward_reduce",
    ):
        assert kernel in printed
    assert "layer4.2  fastres.Bottleneck   yes    c'     triton" in printed
    if not torch.cuda.is_available():
        assert "note: this is what would run where it can: backend 'triton' cannot" in printed


# ---------------------------------------------------------------- demo, its input only


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--out", "no/such/folder/x.html"], "--out must be a file in a folder that exists"),
        (["--device", "toaster"], "--device must name a device of this machine"),
    ],
)
def test_demo_refuses(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, "demo", *arguments)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_demo_keeps_what_is_finished_on_interrupt(tmp_path: Path) -> None:
    needs("sklearn", "rich", "torchvision")
    out = tmp_path / "report.html"
    command = [sys.executable, "-u", "-m", "fastres.cli", "demo", "--quick", "--epochs", "2000"]
    with subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "FORCE_COLOR": "1", "TTY_INTERACTIVE": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        seen = ""
        while "epoch 2," not in seen:  # the first epoch of both is finished
            seen += process.stdout.read(1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted after" in out.read_text(encoding="utf-8")
