"""Reports, wrappers, and models that conversion does not know."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from module_parity import FusedCalls
from torch import Tensor, nn

import fastres
from fastres.nn import ConvBNReLU


def network() -> nn.Module:
    return nn.Sequential(
        ConvBNReLU(3, 8, 3, padding=1), fastres.BasicBlock(8, 8), fastres.BasicBlock(8, 8)
    )


class Foreign(nn.Module):
    """A residual block that no zoo has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.second(self.norm1(self.first(x)).relu()))


@pytest.mark.parametrize("function", [fastres.convert, fastres.revert, fastres.explain])
@pytest.mark.parametrize("wrong", [None, "resnet50", [nn.ReLU()]])
def test_only_modules(function: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got "):
        function(wrong)


def test_nothing_to_convert() -> None:
    report = fastres.convert(nn.Linear(2, 2))
    assert (report.rows, report.changed) == ((), 0)
    assert "nothing to convert" in str(report)


def test_foreign_blocks_are_fused() -> None:
    report = fastres.convert(nn.Sequential(Foreign(), fastres.BasicBlock(4, 4)))
    assert [(r.name, r.fused, r.reason) for r in report.rows] == [
        ("0", True, ""),
        ("1", True, ""),
    ]
    assert report.changed == 1


def test_a_report_in_words_and_as_data() -> None:
    model = network()
    model[1].relu.register_forward_hook(lambda *_: None)
    report = fastres.explain(model)
    text = str(report)
    assert "torch.Sequential: 1 of 2 residual blocks and 1 of 1 chains fused" in text
    assert "relu carries hooks" in text and "fastres.ConvBNReLU" in text
    assert not any(line.endswith(" ") for line in text.splitlines())
    found = json.loads(json.dumps(report.to_dict()))
    assert (found["fused"], found["unfused"], len(found["rows"])) == (2, 1, 3)
    assert found["rows"][0]["backends"]["scale_shift_act"]


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_explain_names_the_kernels(backend: str) -> None:
    for train in (True, False):
        rows = fastres.explain(network().train(train), backend=backend).rows
        for row in rows:
            assert row.level in ("b", "b'", "c'", "c")
            assert {name.split(":")[0] for name in row.backends.values()} == {backend}


def test_explain_of_another_device_and_layout() -> None:
    report = fastres.explain(network(), device="cuda", dtype=torch.bfloat16, channels_last=True)
    assert report.fused == 3 and all(row.level for row in report.rows)


def test_explain_takes_an_example_input() -> None:
    x = torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert fastres.explain(network(), x).fused == 3


def test_explain_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        fastres.explain(network(), backend="abacus")


def test_explain_changes_nothing() -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with FusedCalls() as calls:
        fastres.explain(model)
    assert calls.forward == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_block_that_occurs_twice_is_one_row() -> None:
    block = fastres.BasicBlock(4, 4)
    assert len(fastres.convert(nn.Sequential(block, block)).rows) == 1


def test_a_compiled_model() -> None:
    report = fastres.convert(torch.compile(network(), backend="eager"))
    assert report.fused == 3
    assert any(note.startswith("OptimizedModule: ") for note in report.notes)


def test_sync_batch_norm() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    report = fastres.convert(model)
    assert report.fused == 0 and any("SyncBatchNorm" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1))))
    assert any("ScriptModule" in note for note in fastres.convert(model).notes)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(network())
        report = fastres.convert(model)
        assert report.fused == 3
        assert any("DistributedDataParallel" in note for note in report.notes)
        with FusedCalls() as calls:
            model(torch.randn(2, 3, 8, 8)).sum().backward()
        assert (calls.forward, calls.backward) == (3, 3)
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
