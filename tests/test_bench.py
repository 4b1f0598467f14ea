"""The benchmark's command line: what it refuses, gates, measures, halves, and keeps."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastres
from fastres import cli

pytest.importorskip("fastres.bench", reason="fastres is not installed, or before it had a bench")

from fastres.bench import arguments, baselines, command, gate, interleave, measure, suite, training
from fastres.bench import models as subjects
from fastres.bench.contenders import CONTENDERS, Job, why_not

from fastres.cli.errors import CommandError

ROOT = Path(__file__).resolve().parent.parent
SMALL = Job("block", "256-64, 56x56", 2, 32, "fastres")


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """The one sentence on stderr of a command that exits with 2."""
    assert cli.main(["bench", *line.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("model --batch-size none", "invalid int value: 'none'"),
        ("model --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("block --rounds 1", "--rounds must be at least 2, got 1"),
        ("model --dtype float8", "--dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ("block --against eager,nobody", "--against must be one of eager, channels_last"),
        ("model --backend nobody", "backend must be one of auto"),
        ("model --backend triton --device cpu", "--backend"),
        ("model --level z", "--level must be one of auto, b, b', c', c, got 'z'"),
        ("block --out /proc/nowhere", "must be a folder that can be written to, got /proc"),
        ("kernel --primitive nothing", "--primitive must be one of channel_stats"),
        ("model --model a:resnet50", "LIBRARY one of torchvision, timm, fastres, got 'a:resnet50'"),
        ("model --model fastres:resnet5O", "got 'fastres:resnet5O'; the nearest are resnet50"),
        ("train --data /nowhere", "--data must be a folder with a folder of images per class"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    line: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arguments, "ROOT", tmp_path / "installed")
    if "--out" not in line and line.partition(" ")[2]:
        line += f" --out {tmp_path}"
    assert said in refused(capsys, line)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch sees no GPU" in refused(capsys, "model --device cuda")


def test_results_go_where_the_user_is_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "ROOT", tmp_path / "installed")
    monkeypatch.chdir(tmp_path)
    assert arguments.parse(["block"]).out == Path("fastres-bench")
    assert not arguments.parse(["block", "--quick"]).writes


def test_the_same_command_in_a_checkout() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "model", "--rounds", "1"],
        check=False, capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastres bench: --rounds must be at least 2, got 1\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_contenders_are_named_with_the_reason() -> None:
    cudnn = Job("model", "", 1, 1, "cudnn", mode="infer")
    assert why_not(cudnn) == "cuDNN runs on NVIDIA GPUs only"
    assert "inference only" in str(why_not(replace(cudnn, mode="train", device="cuda")))
    bare = replace(cudnn, contender="convolutions")
    assert why_not(bare) == "it is for conv, block only"
    eager = replace(cudnn, contender="eager")
    assert all(why_not(replace(eager, kind=k)) is None for k in ("block", "model", "train"))


# ---------------------------------------------------------------- the subjects


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_our_own_networks_have_a_stock_twin(name: str) -> None:
    stock, fused = (subjects.network(f"fastres:{name}", f, num_classes=3) for f in (False, True))
    assert not any(isinstance(m, fastres.nn.FusedModule) for m in stock.modules())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(stock.eval()(x), fused.eval()(x), rtol=1e-4, atol=1e-5)


def test_the_convolutions_are_those_of_resnet50() -> None:
    seen = {}

    def watch(conv: nn.Conv2d, given: tuple[torch.Tensor], out: torch.Tensor) -> None:
        shape = (conv.in_channels, conv.out_channels, given[0].shape[2])
        seen[(*shape, conv.kernel_size[0], conv.stride[0])] = conv.padding[0]

    model = subjects.network("fastres:resnet50", fused=False).eval().to("meta")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(watch)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    del seen[3, 64, 224, 7, 2]  # the stem's
    assert seen == {
        (s.channels, s.outputs, s.size, s.kernel, s.stride): s.kernel // 2
        for s in subjects.PARTS["conv"].values()
    }


@pytest.mark.parametrize("name", [*subjects.PARTS["conv"]][::7])
def test_a_convolution_is_fused_with_its_norm(name: str) -> None:
    subject = subjects.Subject("conv", name, 2, 64)
    stock, fused = (subject.build(f) for f in (False, True))
    assert fastres.explain(fused).rows[0].fused
    assert stock.state_dict().keys() == fused.state_dict().keys()
    x = subject.input(0)
    torch.testing.assert_close(stock(x), fused(x), rtol=1e-4, atol=1e-5)


def test_blocks_shrink_with_the_image() -> None:
    subject = subjects.Subject("block", "1024-512, 14x14, stride 2, projection", 3, 64)
    assert (subject.pixels, subject.label) == (4, "1024-512, 4x4, stride 2, projection")
    assert subject.input(0).shape == (3, 1024, 4, 4)


# ---------------------------------------------------------------- parity before speed


def test_what_is_right_passes() -> None:
    assert gate.parity_of(SMALL) == "ok"
    assert gate.parity_of(replace(SMALL, mode="infer", amp=True)) == "ok"


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_what_is_wrong_gets_no_speed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: nn.Module) -> None:
        module.bn2.eps *= 100

    changed = {**CONTENDERS, "eager": replace(CONTENDERS["eager"], change=wrong)}
    monkeypatch.setattr("fastres.bench.contenders.CONTENDERS", changed)
    parity = gate.parity_of(replace(SMALL, contender="eager", mode=mode))
    assert parity.startswith("failed: the output: channel"), parity


def test_a_wrong_fused_block_is_found_by_its_own_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = Job.module

    def wrong(self: Job) -> nn.Module:
        module = build(self)
        module.layer2[0].bn1.momentum = 0.2
        return module

    monkeypatch.setattr(Job, "module", wrong)
    job = Job("train", subjects.DIGITS, 8, 16, "fastres")
    assert gate.parity_of(job).startswith("failed: layer2.0: bn1.running_mean")


def test_a_contender_that_crashes_is_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "module", lambda self: 1 / 0)
    assert gate.parity_of(SMALL) == "failed: ZeroDivisionError: division by zero"


# ---------------------------------------------------------------- other people's blocks


def test_folded_inference_is_the_networks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's two functions are stood in for: what is given to them is what is tested."""

    def conv_add_relu(x: Any, weight: Any, z: Any, alpha: float, *rest: Any) -> torch.Tensor:
        return (torch.conv2d(x, weight, *rest) + alpha * z).relu()

    monkeypatch.setattr(
        torch, "cudnn_convolution_relu", lambda x, *rest: torch.conv2d(x, *rest).relu()
    )
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    assert gate.parity_of(Job("block", SMALL.name, 2, 32, "cudnn", mode="infer")) == "ok"
    other = Job("block", "64-64, 56x56, stride 1, projection", 2, 32, "cudnn", mode="infer")
    name = next(n for n in subjects.BLOCKS if n.startswith("64-64"))
    assert gate.parity_of(replace(other, name=name)) == "ok"


def test_inplace_abn_is_held_to_leaky_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is stood in for by what it computes."""

    class InPlaceABN(nn.BatchNorm2d):
        def __init__(
            self, n: int, eps: float, momentum: float, activation: str, activation_param: float
        ) -> None:
            super().__init__(n, eps, momentum)
            self.slope = activation_param

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.leaky_relu(super().forward(x), self.slope)

    found = type("Package", (), {"InPlaceABN": InPlaceABN})
    monkeypatch.setattr(baselines, "library", lambda name: found)
    assert gate.parity_of(replace(SMALL, contender="inplace_abn")) == "ok"


# ---------------------------------------------------------------- steps, memory and time


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("contender", ["eager", "fastres", "convolutions"])
def test_a_step_is_measured(contender: str, mode: str) -> None:
    found = measure.Measured(replace(SMALL, contender=contender, mode=mode))
    assert found.milliseconds() > 0 and found.facts.warm_ups >= 3
    saves = mode == "train" and contender != "convolutions"
    assert (found.facts.saved_bytes is not None) == saves
    assert (found.facts.level is not None) == (contender == "fastres")


def test_training_changes_a_networks_weights() -> None:
    job = Job("model", subjects.DIGITS, 4, 8, "eager", amp=True)
    module = job.module()
    before = copy.deepcopy(module.state_dict())
    x = job.place(job.subject.input(0))
    measure.step_of(job, module, x)(x)
    assert not torch.equal(before["conv1.weight"], module.conv1.weight)


def test_steady_is_three_times_within_a_tenth() -> None:
    assert measure.steady([9.0, 1.0, 1.05, 1.09])
    assert not measure.steady([1.0, 1.0]) and not measure.steady([1.0, 1.0, 1.2])


def test_contenders_alternate_and_ctrl_c_keeps_whole_rounds() -> None:
    seen: list[str] = []

    def step(name: str) -> float:
        seen.append(name)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return float(len(seen))

    with pytest.raises(interleave.Interrupted) as stop:
        interleave.alternate({"a": lambda: step("a"), "b": lambda: step("b")}, 9)
    assert seen == ["a", "b"] * 3
    assert stop.value.samples == {"a": [1.0, 3.0], "b": [2.0, 4.0]}


# ---------------------------------------------------------------- interleaved, with played workers


class Played:
    """A worker that answers at once: a gate that "wrong" fails, and no room for more than 4."""

    def __init__(self, kept: bool = False) -> None:
        self.kept = kept

    def ask(self, what: str, job: dict[str, Any] | None = None, **more: Any) -> Any:
        if what == "roof":
            return {"bandwidth_gb_s": 10.0, "peak_tflop_s": 0.1}
        assert job is not None
        if what == "gate":
            assert not job["contender"].endswith("kept")
            return "failed: it is off" if job["contender"] == "compile" else "ok"
        if job["batch"] > 4:
            raise interleave.NoMemoryError("can't allocate memory")
        if what == "time":
            return 2.0 if job["contender"].startswith("fastres") else 3.0
        if job["contender"] == "channels_last":
            raise interleave.FailedError("nothing works")
        return {"peak_bytes": 5, "saved_bytes": 3, "level": "c", "note": None}

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing to end."""


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[Played]:
    monkeypatch.setattr(suite, "Worker", Played)
    monkeypatch.setattr(training, "Worker", Played)
    return Played


def run(line: str, out: Path) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and rows of a command; a result of an interrupted one too."""
    status = cli.main(["bench", *line.split(), "--no-report", "--out", str(out)])
    (path,) = out.glob("*.json")
    assert path.with_name(path.name.removesuffix("json") + "csv").exists()
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return status, rows


def test_memory_halves_the_batch_and_parity_keeps_the_speed(
    played: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "block --mode train --batch-size 16 --img-size 32 --device cpu --against"
    status, rows = run(f"{line} eager,compile,channels_last,cudnn", tmp_path)
    err = " ".join(capsys.readouterr().err.split())
    assert status == 0 and "absent: cudnn: cuDNN runs on NVIDIA GPUs only" in err
    assert "out of memory (can't allocate memory); batch 16 -> 8" in err and "batch 8 -> 4" in err
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["absent"] == "cudnn: cuDNN runs on NVIDIA GPUs only"
    one = [row for row in rows if row["subject"] == rows[0]["subject"]]
    assert [(row["contender"], row["allocator"]) for row in one] == [
        (n, a) for a in (None, "kept") for n in ("eager", "compile", "channels_last", "fastres")
    ]
    first = {row["contender"]: row for row in one if row["allocator"] is None}
    fused = first["fastres"]
    assert (fused["batch"], fused["ms"], fused["speedup"]) == (4, 2.0, 1.5)
    assert fused["note"] == "batch halved from 16, out of memory" and fused["parity"] == "ok"
    assert fused["bound_ms"] > 0 and fused["bytes"] < first["eager"]["bytes"]
    assert first["compile"]["ms"] is None and first["compile"]["parity"] == "failed: it is off"
    assert (
        first["channels_last"]["ms"] is None and "nothing works" in first["channels_last"]["note"]
    )
    kept = {row["contender"]: row for row in one if row["allocator"] == "kept"}
    assert kept["channels_last"]["ms"] == 3.0
    assert kept["fastres"]["speedup"] == kept["eager"]["ms"] / kept["fastres"]["ms"]


def test_who_cannot_train_is_timed_in_inference_alone(
    played: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    infers = replace(CONTENDERS["cudnn"], why_not=lambda job: {"train": "no"}.get(job.mode))
    monkeypatch.setitem(CONTENDERS, "cudnn", infers)
    status, rows = run("block --quick --batch-size 2 --device cpu --against eager,cudnn", tmp_path)
    assert status == 0 and "absent: cudnn in train: no" in capsys.readouterr().err
    ran = {mode: {r["contender"] for r in rows if r["mode"] == mode} for mode in ("train", "infer")}
    assert ran == {"train": {"eager", "fastres"}, "infer": {"eager", "cudnn", "fastres"}}


def test_an_engine_that_cannot_run_is_left_out_with_the_reason(
    played: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Played.ask

    def cannot(self: Any, what: str, **more: Any) -> Any:
        if what == "gate" and more["job"]["contender"] == "onnxruntime":
            return "cannot run: no such operator"
        return {} if what == "blocks" else ask(self, what, **more)

    monkeypatch.setattr(Played, "ask", cannot)
    for name, package in (("onnxruntime", "torchvision"), ("openvino", "numpy")):
        there = replace(CONTENDERS[name], packages=(package,))
        monkeypatch.setitem(CONTENDERS, name, there)
    line = "model --model fastres:resnet18 --mode infer --batch-size 2 --img-size 32 --device cpu"
    status, rows = run(f"{line} --no-kept --against onnxruntime,openvino", tmp_path)
    assert status == 0 and "infer, onnxruntime: cannot run: no" in capsys.readouterr().err
    left_out, timed, _ = rows
    assert (left_out["ms"], left_out["parity"]) == (None, None)
    assert left_out["note"] == "cannot run: no such operator"
    assert (timed["ms"], timed["parity"], timed["layout"]) == (3.0, "ok", "nchw")
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert "numpy" in result and "torchvision" not in result


def test_not_one_image_fits(
    played: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Played.ask

    def full(self: Any, what: str, **more: Any) -> Any:
        if what == "prepare":
            raise interleave.NoMemoryError("no")
        return ask(self, what, **more)

    monkeypatch.setattr(Played, "ask", full)
    status, rows = run("block --quick --mode infer --device cpu --against eager", tmp_path)
    assert status == 1 and {(row["ms"], row["note"]) for row in rows} == {(None, "out of memory")}
    assert "batch 2 -> 1" in (err := capsys.readouterr().err) and "not even one image fits" in err


def test_a_process_that_dies_costs_no_finished_row(
    played: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Played.ask

    def dies(self: Any, what: str, **more: Any) -> Any:
        if what == "time" and more["job"]["name"].startswith("1024"):
            raise interleave.FailedError("the process ended with status -11: it said nothing")
        return ask(self, what, **more)

    monkeypatch.setattr(Played, "ask", dies)
    status, rows = run("block --quick --mode infer --device cpu --against eager", tmp_path)
    assert status == 2 and [row["contender"] for row in rows] == ["eager", "fastres"]
    assert "the measurement failed: the process ended with status -11" in capsys.readouterr().err


def test_training_halves_its_batch_too(
    played: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    step = training.Contender.step

    def small_only(self: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        if len(images) > 200:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        step(self, images, labels)

    monkeypatch.setattr(training.Contender, "step", small_only)
    _, rows = run("train --quick --batch-size 400 --workers 0 --device cpu", tmp_path)
    assert {row["batch"] for row in rows} == {200} and all(row["ms"] for row in rows)
    assert "batch 400 -> 200" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_finished(
    played: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, times = Played.ask, []

    def interrupted(self: Any, what: str, **more: Any) -> Any:
        times.append(what)
        if times.count("time") > 7:
            raise KeyboardInterrupt
        return ask(self, what, **more)

    monkeypatch.setattr(Played, "ask", interrupted)
    line = "block --quick --batch-size 2 --mode train --device cpu --against eager --rounds 5"
    status, rows = run(line, tmp_path)
    assert status == 130
    assert [(row["contender"], row["rounds"]) for row in rows] == [("eager", 3), ("fastres", 3)]


# ---------------------------------------------------------------- whole runs, tiny


def test_a_model_is_measured_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "model --model fastres:resnet18 --quick --batch-size 2 --img-size 32 --mode infer"
    status, rows = run(f"{line} --device cpu --against eager", tmp_path)
    assert status == 0
    printed = capsys.readouterr()
    assert "resnet18 of fastres.models" in printed.err and "fastres" in printed.out
    assert [(r["contender"], r["parity"], r["mode"]) for r in rows] == [
        ("eager", "ok", "infer"), ("fastres", "ok", "infer"),
    ]  # fmt: skip
    assert all(r["ms"] > 0 and r["peak_bytes"] > 0 and r["bound_ms"] > 0 for r in rows)


def test_training_has_rates_and_curves(played: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    status, rows = run("train --quick --workers 0 --device cpu", tmp_path)
    assert status == 0 and [row["contender"] for row in rows] == ["channels_last", "fastres"]
    (path,) = tmp_path.glob("*.json")
    curves = json.loads(path.read_text())["curves"]
    for row in rows:
        curve = curves[row["contender"]]
        assert len(curve["seconds"]) == len(curve["loss"]) == row["rounds"] > 10
        assert len(curve["accuracy"]) == 1 and "accuracy" in row["note"]
        seconds = curve["seconds"][-1]
        assert row["images_per_s"] == pytest.approx(64 * row["rounds"] / seconds, rel=0.01)
    assert rows[0]["saved_bytes"] > rows[1]["saved_bytes"] > 0


def test_images_of_a_folder_are_learned(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(5):
            image.new("RGB", (12, 10), (20 * i, 0, 0)).save(tmp_path / label / f"{i}.png")
    found = training.pipeline("fastres:resnet18", tmp_path, 8)
    images, labels = next(iter(found.batches(4, 0, 0)))
    assert images.shape == (4, 3, 8, 8) and set(labels.tolist()) <= {0, 1}
    assert sum(len(y) for _, y in found.tests(4, 0)) == 2
    assert found.build(False).fc.out_features == 2


#: The network of the digits in place of a large one; only this process differs from torchrun's.
TOGETHER = """
from fastres.bench import distributed
from fastres.bench.contenders import Job
job = Job("model", "digits", 2, 8, "")
rows = distributed.rows(job, ["channels_last", "fastres"], 2, lambda sentence: None)
if distributed.leads():
    for row in rows:
        print(row["contender"], "|", row["batch"], "|", row["parity"], "|", row["note"])
"""


def test_processes_are_measured_together(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "together.py")],
        check=False, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()]
    assert [row[:3] for row in rows] == [
        ["channels_last", "2", "ok"], ["fastres", "2", "ok"],
        ["channels_last, 2 processes", "4", "ok"], ["fastres, 2 processes", "4", "ok"],
    ]  # fmt: skip
    assert all(row[3].startswith("scaling efficiency") for row in rows[2:])


def test_help_names_every_command_and_contender(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*arguments.KINDS, *arguments.OTHERS, *CONTENDERS))
    with pytest.raises(CommandError):
        subjects.find("nothing-like-it:at all")


@pytest.mark.exhaustive
def test_the_suites_time_what_the_commands_time(tmp_path: Path) -> None:
    """`make bench-pytest`, on tiny sizes: groups of contenders, with what they moved and kept."""
    told = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/suites", "--quick", "--device", "cpu", "-k",
         "act_backward or block", "-p", "no:cacheprovider", f"--benchmark-json={told}"],
        # Of its own: beside another worker of this run it would time nothing.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        check=False, capture_output=True, text=True, timeout=500, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(told.read_text())["benchmarks"]
    groups: dict[str, set[str]] = {}
    for one in found:
        info = one["extra_info"]
        groups.setdefault(one["group"], set()).add(
            info.get("contender", info.get("implementation"))
        )
        assert info["bytes"] > 0 if "bytes" in info else "saved_bytes" in info
    assert groups["block 256-64, 8x8, train, batch 2"] == {"eager", "channels_last", "fastres"}
    assert groups["act_backward, mask, 2x16x6x5"] == {"aten:formula", "cpu:act_backward"}
