"""Children that are gone, are None, or are functions: a block does what its stock class does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import CLASSIC, KINDS, Kind
from module_parity import raised
from torch import Tensor, nn

import fastres
from fastres.nn import BNAddReLU, BNReLU, ConvBNReLU, bound
from fastres.nn import stock as plain


def gone(block: nn.Module, name: str) -> None:
    delattr(block, name)


def none(block: nn.Module, name: str) -> None:
    setattr(block, name, None)


def function(block: nn.Module, name: str) -> None:
    """A plain function, which torch keeps among a module's attributes."""
    delattr(block, name)
    setattr(block, name, torch.relu)


def other(block: nn.Module, name: str) -> None:
    setattr(block, name, nn.LeakyReLU(0.2))


SURGERY = (gone, none, function, other)
Operate = Callable[[nn.Module, str], None]


def outcome(module: nn.Module, *inputs: Tensor) -> Any:
    """What a call gives: output and buffers, or the kind of error."""
    found: list[Any] = []

    def run() -> None:
        torch.manual_seed(0)
        found.extend([module(*inputs).detach(), *[b.clone() for b in module.buffers()]])
        raise StopIteration

    error, _ = raised(run)
    return found if error is StopIteration else error


def assert_alike(fused: nn.Module, stock: nn.Module, *inputs: Tensor) -> None:
    """The same result, or an error of the same kind; and reports can be made."""
    expected, found = outcome(stock, *inputs), outcome(fused, *inputs)
    if isinstance(expected, type):
        assert found is expected
    else:
        torch.testing.assert_close(found, expected)
    assert str(fastres.explain(fused))


@pytest.mark.parametrize("operate", SURGERY)
@pytest.mark.parametrize("each", [*CLASSIC, *KINDS], ids=str)
def test_each_child_of_a_built_block(each: Kind, operate: Operate) -> None:
    x = each.input(torch.float64)
    names = [name for name, _ in each.pair()[0].named_children()]
    for name in names:
        for called in (False, True):  # What was found before does not outlive it.
            stock, fused = each.pair(torch.float64)
            if called:
                torch.manual_seed(0)
                fused(x)
                stock.load_state_dict(fused.state_dict())
            for module in (stock, fused):
                operate(module, name)
            assert_alike(fused, stock, x)


def _pieces() -> list[tuple[nn.Module, nn.Module, int]]:
    """Our small modules, torch's stock forward of each, and how many inputs they take."""

    class Own(nn.Module):
        def __init__(self, piece: nn.Module) -> None:
            super().__init__()
            for name, child in copy.deepcopy(piece).named_children():
                setattr(self, name, child)

        def forward(self, x: Tensor, r: Tensor | None = None) -> Tensor:
            x = self.conv(x) if hasattr(self, "conv") else x
            z = self.bn(x)
            out: Tensor = self.relu(z if r is None else z + r)
            return out

    made = (ConvBNReLU(8, 8, 3), BNReLU(8), BNAddReLU(8))
    return [(p.double(), Own(p).double(), 1 + (type(p) is BNAddReLU)) for p in made]


@pytest.mark.parametrize("operate", SURGERY)
@pytest.mark.parametrize("which", range(3))
def test_each_child_of_a_piece(which: int, operate: Operate) -> None:
    for name in ("bn", "relu"):
        fused, stock, count = _pieces()[which]
        for module in (fused, stock):
            operate(module, name)
        assert_alike(fused, stock, *[torch.randn(2, 8, 5, 5, dtype=torch.float64)] * count)


def _zoo(which: str) -> list[nn.Module]:
    from conftest import load_torchvision

    load_torchvision()
    if which == "torchvision":
        from torchvision.models import resnet

        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
        return [resnet.BasicBlock(8, 16, 2, down), resnet.Bottleneck(8, 2)]
    if which == "timm":
        resnet = pytest.importorskip("timm.models.resnet")
        return [resnet.BasicBlock(8, 8), resnet.Bottleneck(8, 2, drop_path=nn.Dropout(0.5))]
    hf = pytest.importorskip("transformers.models.resnet.modeling_resnet")
    return [hf.ResNetBasicLayer(8, 8), hf.ResNetBottleNeckLayer(8, 8), hf.ResNetConvLayer(8, 8)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operate", SURGERY)
@pytest.mark.parametrize("which", ["torchvision", "timm", "transformers"])
def test_each_child_of_a_converted_block(which: str, operate: Operate, when: str) -> None:
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for made in _zoo(which):
        made.double()
        for name in [name for name, _ in made.named_children()]:
            stock, fused = copy.deepcopy(made), copy.deepcopy(made)
            if when == "after":
                fastres.convert(fused)
            for module in (stock, fused):
                operate(module, name)
            if when == "before":
                fastres.convert(fused)
            assert_alike(fused, stock, x)


@pytest.mark.parametrize("same", [bound._same_items, bound.same_items], ids=["python", "compiled"])
def test_attributes_are_compared_by_identity(same: Any) -> None:
    """A parameter that is replaced by one of equal values is another one."""
    one, equal = torch.zeros(()), torch.zeros(())
    held = {"weight": one, "bias": None}
    assert same([held, {}], [dict(held), {}])
    for other in (
        {"weight": equal, "bias": None}, {"weight": one}, {"weight": one, "scale": None},
        {"bias": None, "weight": one}, {**held, "more": 1}, {},
    ):  # fmt: skip
        assert not same([held, {}], [other, {}])
        assert not same([{}, other], [{}, held])


@pytest.mark.parametrize("guards", [True, False])
def test_a_parameter_that_is_replaced_through_data_is_seen(
    guards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's guards on tensors, and where there are none."""
    if not guards:
        monkeypatch.setattr(bound, "_alike", lambda tensors: bound._never)
    torch.manual_seed(0)
    block, x = fastres.BasicBlock(8, 8).eval(), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        block(x), block(x)
        block.conv1.weight.data = torch.randn(8, 8, 3, 3).to(memory_format=torch.channels_last)
        block.bn2.weight.data = torch.randn(8)
        stock = plain.BasicBlock(8, 8).eval()
        stock.load_state_dict(block.state_dict())
        torch.testing.assert_close(block(x), stock(x))
        block.double()
        torch.testing.assert_close(block(x.double()), stock.double()(x.double()))
