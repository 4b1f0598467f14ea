"""What `revert` gives back: classes of zoos, of FSDP2's making, and of blocks built as ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import CLASSIC, KINDS, STOCK, Kind, kind
from module_parity import FusedCalls, assert_same, step
from torch import Tensor, nn

import fastres


@pytest.mark.parametrize("each", [*CLASSIC, *KINDS], ids=str)
def test_built_blocks_become_stock_ones_where_that_is_asked_for(each: Kind) -> None:
    _, block = each.pair(torch.float64)
    twin, cls = copy.deepcopy(block), type(block)
    assert fastres.revert(block).changed == 0 and type(block) is cls
    report = fastres.revert(block, built=True)
    assert report.changed == 1 and report.fused == 0
    assert type(block) is STOCK[cls]
    x = each.input(torch.float64)
    with FusedCalls() as calls:
        found = step(block, x)
    assert calls.forward == 0
    assert_same(found, step(twin, x))
    assert fastres.convert(block).fused == 1 and type(block) is cls


class Marked(fastres.BasicBlock):
    """A subclass without code."""

    mark = 3


class Doubled(fastres.BasicBlock):
    """A subclass whose code knows its class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(("cls", "calls"), [(Marked, 0), (Doubled, 1)])
def test_a_subclass_of_a_built_block(cls: type, calls: int) -> None:
    """It becomes a subclass of the stock block, or the report says that it does not."""
    block = cls(8, 8).eval()
    twin, x = copy.deepcopy(block), kind("basic").input().detach()
    report = fastres.revert(block, built=True)
    assert type(block).__name__ == cls.__name__ and vars(block).keys() == vars(twin).keys()
    assert isinstance(block, fastres.nn.FusedModule) is bool(calls)
    assert any("Doubled" in note for note in report.notes) is bool(calls)
    with FusedCalls() as counted:
        found = block(x)
    assert counted.forward == calls
    torch.testing.assert_close(found, twin(x))


def test_a_built_network() -> None:
    model = fastres.models.resnet18(num_classes=3).eval()
    twin, x = copy.deepcopy(model), torch.randn(1, 3, 32, 32)
    assert fastres.revert(model, built=True).changed == 8
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)


def _torchvision() -> list[nn.Module]:
    from conftest import load_torchvision

    load_torchvision()
    from torchvision.models import resnet

    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
    return [resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 16, 2, down)]


def _built() -> list[nn.Module]:
    return [fastres.BasicBlock(8, 8), fastres.Bottleneck(8, 2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("first", ["convert", "fully_shard"])
@pytest.mark.parametrize("make", [_torchvision, _built], ids=["torchvision", "built"])
def test_reverting_behind_fsdp2(
    make: Callable[[], list[nn.Module]], first: str, tmp_path: Any
) -> None:
    """Its wrappers are classes of their own, which revert did not look into, nor say so."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        blocks = make()
        model, classes = nn.Sequential(*blocks), [type(b) for b in blocks]
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        if first == "convert":
            fastres.convert(model)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        if first != "convert":
            fastres.convert(model)
        x = torch.randn(2, 8, 6, 6)
        with FusedCalls() as calls:
            out = model(x)
        assert calls.forward == 2
        report = fastres.revert(model, built=make is _built)
        assert report.changed == 2 and report.fused == 0
        with FusedCalls() as calls:
            torch.testing.assert_close(model(x), out)
        assert calls.forward == 0
        for block, cls in zip(model, classes, strict=True):
            assert isinstance(block, FSDPModule) and isinstance(block, STOCK.get(cls, cls))
    finally:
        torch.distributed.destroy_process_group()
