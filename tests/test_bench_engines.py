"""Inference engines as contenders of the benchmark: played ones, and real ones where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("fastres.bench", reason="fastres is not installed, or before it had a bench")

from fastres.bench import arguments, bounds, conditions, engines, gate, interleave, measure, results
from fastres.bench.contenders import CONTENDERS, Job, why_not
from fastres.bench.models import DIGITS
from fastres.bench.worker import Bench

from fastres import cli

#: The packages of each engine, from before any test changes them.
NEEDS = {name: who.packages for name, who in CONTENDERS.items() if who.engine}


class Program:
    """What torch.onnx.export returns; its file is the module itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def save(self, path: str) -> None:
        torch.save(self.module, path)


class AtOnce:
    """A worker that is no process."""

    asked: list[str] = []

    def ask(self, **request: Any) -> Any:
        self.asked.append(Path(request["path"]).name)
        return Bench().answer(**request)

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing to end."""


def played(off: float = 0.0) -> Callable[[Path, int], engines.Call]:
    """An engine that runs the module in the file; one value of its result can be off."""

    def load(network: Path, threads: int) -> engines.Call:
        assert threads == torch.get_num_threads()
        module = torch.load(network, weights_only=False)
        assert not module.training

        def call(array: Any) -> Any:
            out = module(torch.from_numpy(array)).numpy()
            out[0, 0] += off
            return out

        return call

    return load


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    """Inference of a small network by a played engine called onnxruntime."""
    monkeypatch.setattr(torch.onnx, "export", lambda module, args, **_: Program(module))
    monkeypatch.setattr(engines, "Worker", AtOnce)
    monkeypatch.setattr(AtOnce, "asked", [])
    for name in NEEDS:
        monkeypatch.setitem(
            CONTENDERS, name, replace(CONTENDERS[name], engine=played(), packages=("numpy",))
        )
    return Job("model", DIGITS, 2, 8, "onnxruntime", mode="infer", exports=str(tmp_path))


def test_an_engine_is_measured_like_anybody(job: Job) -> None:
    assert why_not(job) is None and gate.parity_of(job) == "ok"
    found = measure.Measured(job)
    assert found.milliseconds() > 0 and found.facts.saved_bytes is None
    assert bounds.level_of(job, None) == "b" and not job.nhwc


def test_a_wrong_engine_gets_no_speed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(CONTENDERS["onnxruntime"], engine=played(1e-4))
    monkeypatch.setitem(CONTENDERS, "onnxruntime", wrong)
    assert gate.parity_of(job).startswith("failed: the output: ")


def test_a_network_is_exported_once_for_each_size(job: Job) -> None:
    for each in (job, replace(job, contender="openvino, kept"), replace(job, batch=1)):
        with torch.no_grad():
            assert each.module()(each.subject.input(0)).shape == (each.batch, 10)
    assert AtOnce.asked == ["digits-2-8.onnx", "digits-1-8.onnx"]


def test_what_cannot_be_exported_or_loaded_is_not_called_wrong(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise interleave.FailedError("no such operator\nand much more")

    broken = replace(CONTENDERS["onnxruntime"], engine=refuses)
    monkeypatch.setitem(CONTENDERS, "onnxruntime", broken)
    said = "cannot run: onnxruntime does not load it: no such operator"
    assert gate.parity_of(replace(job, contender="onnxruntime, kept")) == said
    monkeypatch.setattr(torch.onnx, "export", refuses)
    said = "cannot run: the export to ONNX failed: no such operator"
    assert gate.parity_of(replace(job, batch=1, size=9)) == said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mode": "train"}, "it runs inference only"),
        ({"device": "cuda"}, "it is compared on a CPU only"),
        ({"dtype": "bfloat16"}, "it is compared in float32 only"),
        ({"amp": True}, "it is compared in float32 only"),
        ({"kind": "block"}, "it is for model only"),
    ],
)
def test_engines_say_what_they_are_not_for(changed: dict[str, Any], said: str, job: Job) -> None:
    assert why_not(replace(job, **changed)) == said


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = replace(CONTENDERS["openvino"], packages=("numpy", "nobody_has_this", "nor_that"))
    monkeypatch.setitem(CONTENDERS, "openvino", lacks)
    absent = Job("model", DIGITS, 2, 8, "openvino", mode="infer")
    assert why_not(absent) == "not installed: nobody_has_this, nor_that"


@pytest.mark.parametrize("line", ["--mode infer", "", "--mode train", "--amp", "--quick"])
def test_engines_are_there_where_they_can_run(line: str, job: Job, tmp_path: Path) -> None:
    asked = ["model", "--device", "cpu", "--out", str(tmp_path), *line.split()]
    usual = arguments.QUICK_AGAINST if "quick" in line else arguments.AGAINST
    expected = [*usual.split(","), *(NEEDS if line in ("--mode infer", "") else ())]
    assert arguments.parse(asked).against == expected
    asked[0] = "block"
    assert arguments.parse(asked).against == usual.split(",")


def test_conditions_have_the_versions_of_what_took_part() -> None:
    found = conditions.conditions("cpu", ["numpy", "nobody-has-this"])
    assert (found["numpy"], found["nobody-has-this"]) == (version("numpy"), "not installed")


@pytest.mark.parametrize("name", NEEDS)
def test_the_real_engine_is_measured_from_end_to_end(name: str, tmp_path: Path) -> None:
    if missing := [package for package in NEEDS[name] if find_spec(package) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    line = "model --model fastres:resnet18 --quick --img-size 32 --mode infer --device cpu"
    line += f" --against eager,{name} --no-report --out {tmp_path}"
    status = cli.main(["bench", *line.split()])
    (path,) = tmp_path.glob("*.json")
    result = results.read(path)
    assert status == 0 and result[name] == version(name)
    rows = [row for row in result["rows"] if row["contender"] == name]
    assert [(row["mode"], row["parity"], row["layout"]) for row in rows] == [
        ("infer", "ok", "nchw")
    ]
    assert rows[0]["ms"] > 0 and rows[0]["peak_bytes"] > 0
