"""Who finds max pooling behind a chain: conversion by class and by tracing, and ResNets of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from module_parity import FusedCalls, assert_same, randomise, step
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres.convert.traced import bindings_of
from fastres.kernels import MaxPool
from fastres.nn.match import Decline, match
from fastres.nn.stem import FusedStem
from fastres.testing import saved_bytes

LAST = torch.channels_last


class Net(nn.Module):
    """A chain whose end is written by hand, and a block of a kind behind it."""

    def __init__(self, end: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.end = end
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.end(self, self.norm(self.conv(x))))
        return out


POOLED: dict[str, tuple[Callable[..., Any], MaxPool]] = {
    "module": (lambda m, x: m.pool(m.relu(x)), MaxPool((3, 3), (2, 2), (1, 1))),
    "function": (lambda m, x: F.max_pool2d(m.relu(x), 3, 2, 1), MaxPool((3, 3), (2, 2), (1, 1))),
    "keywords": (
        lambda m, x: F.max_pool2d(F.relu(x), kernel_size=(2, 3), dilation=(1, 2), ceil_mode=True),
        MaxPool((2, 3), (2, 3), (0, 0), (1, 2), True),
    ),
    "of torch": (lambda m, x: torch.max_pool2d(m.relu(x), 2), MaxPool((2, 2), (2, 2))),
    "in place": (lambda m, x: F.max_pool2d(F.relu_(x), 2, 1), MaxPool((2, 2), (1, 1))),
    "no activation": (lambda m, x: m.pool(x), MaxPool((3, 3), (2, 2), (1, 1))),
    "silu": (lambda m, x: m.pool(F.silu(x)), MaxPool((3, 3), (2, 2), (1, 1))),
}


def _input(dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(4, 3, 17, 14, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.contiguous(memory_format=LAST)


def _pools(module: nn.Module) -> list[MaxPool | None]:
    """The max pooling of each run of a module that was traced."""
    plans = [plan for plans in bindings_of(module).plans.values() for plan in plans]
    found = []
    for plan in plans:
        for run in plan.found.runs:
            matched = match(run.parts, alone=True)
            assert not isinstance(matched, Decline)
            found.append(matched.block.max_pool)
    return found


def _converted(stock: nn.Module) -> nn.Module:
    model = copy.deepcopy(stock)
    fastres.convert(model)
    return model


def _net(end: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net(end)).double().to(memory_format=LAST)


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("name", POOLED)
def test_a_chain_by_hand(name: str, mode: str) -> None:
    end, pool = POOLED[name]
    stock = _net(end).train(mode == "train")
    model = _converted(stock)
    with FusedCalls() as calls:
        found = step(model, _input(), backward=mode != "inference")
    assert calls.forward == 1 and _pools(model) == [pool]
    assert_same(found, step(stock, _input(), backward=mode != "inference"))
    report = fastres.explain(model)
    assert report.chains == (1, 1) and report.fused == len(report.rows) == 1
    kernels = report.rows[0].backends
    assert mode != "train" or kernels["scale_shift_act_pool"] == "cpu:scale_shift_act_pool"


def _two_readers(m: Any, x: Tensor) -> Tensor:
    z = m.relu(x)
    return m.pool(z) + F.avg_pool2d(z, 3, 2, 1)


ALONE: dict[str, Callable[..., Any]] = {
    "two readers": _two_readers,
    "indices": lambda m, x: F.max_pool2d(m.relu(x), 2, return_indices=True)[0],
    "too many taps": lambda m, x: F.max_pool2d(F.pad(m.relu(x), (9, 9, 9, 9)), 16, 4),
    "average": lambda m, x: F.avg_pool2d(m.relu(x), 3, 2, 1),
    "adaptive": lambda m, x: F.adaptive_max_pool2d(m.relu(x), 3),
    "dropped": lambda m, x: m.pool(F.dropout(m.relu(x), 0.5, m.training)),
}


@pytest.mark.parametrize("name", ALONE)
def test_pooling_that_is_left_to_torch(name: str) -> None:
    """The chain in front of it is fused as ever."""
    stock = _net(ALONE[name])
    model = _converted(stock)
    with FusedCalls() as calls:
        torch.manual_seed(2)
        found = step(model, _input())
    assert calls.forward == 1 and _pools(model) == [None]
    torch.manual_seed(2)
    assert_same(found, step(stock, _input()))


@pytest.mark.parametrize("child", ["pool", "relu"])
def test_hooks_see_what_they_saw(child: str) -> None:
    stock = _net(POOLED["module"][0])
    model = _converted(stock)
    step(model, _input())
    step(stock, _input())
    seen: list[Tensor] = []
    handle = model.get_submodule(child).register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    assert_same(step(model, _input()), step(stock, _input()))
    assert len(seen) == 1
    handle.remove()
    with FusedCalls() as calls:
        found = step(model, _input())
    assert calls.forward == 1 and len(seen) == 1
    assert_same(found, step(stock, _input()))


class Preact(nn.Module):
    """The norm of a block follows the pooling, and a sum takes in both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        out: Tensor = z + self.conv(F.relu(self.norm(z))) + self.side(z)
        return out


def test_sums_take_in_what_was_pooled() -> None:
    torch.manual_seed(0)
    stock = randomise(Preact()).double().to(memory_format=LAST)
    model = _converted(stock)
    with FusedCalls() as calls:
        found = step(model, _input())
    assert calls.forward == 3
    assert_same(found, step(stock, _input()))


# ---------------------------------------------------------------- ResNets


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomise(fastres.models.resnet18(num_classes=3)).double().to(memory_format=LAST)


def _images() -> Tensor:
    x = torch.randn(2, 3, 40, 34, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.contiguous(memory_format=LAST)


def _unfused(model: nn.Module) -> nn.Module:
    """The same network by torch's operators."""
    made = copy.deepcopy(model)
    for module in made.modules():
        # A hook on a child is what no block is fused with.
        for child in module.children():
            if isinstance(child, nn.Conv2d | nn.BatchNorm2d):
                child.register_forward_hook(lambda module, args, out: None)
    return made


def _stem(model: nn.Module) -> Any:
    matched = model.matched() if isinstance(model, FusedStem) else None
    assert matched is not None
    return matched.block


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_the_stem_of_ours(mode: str) -> None:
    model = _resnet().train(mode == "train")
    assert _stem(model).max_pool == MaxPool((3, 3), (2, 2), (1, 1))
    stock, backward = _unfused(model), mode != "inference"
    with FusedCalls() as calls:
        found = step(model, _images(), backward=backward)
    assert calls.forward == 9
    with FusedCalls() as calls:
        expected = step(stock, _images(), backward=backward)
    assert calls.forward == 0
    assert_same(found, expected)


def _hooked(model: Any) -> None:
    model.maxpool.register_forward_hook(lambda module, args, out: 2 * out)


def _replaced(model: Any) -> None:
    model.maxpool = nn.AvgPool2d(3, 2, 1)


def _identity(model: Any) -> None:
    model.maxpool = nn.Identity()


def _other_settings(model: Any) -> None:
    model.maxpool.kernel_size, model.maxpool.padding = 2, 0


@pytest.mark.parametrize(
    ("change", "pool"),
    [
        (_hooked, None),
        (_replaced, None),
        (_identity, None),
        (_other_settings, MaxPool((2, 2), (2, 2))),
    ],
)
def test_the_pooling_of_a_stem_that_changes(
    change: Callable[[Any], None], pool: MaxPool | None
) -> None:
    """Before a first call, and after one."""
    for called in (False, True):
        model = _resnet()
        stock = _unfused(model)
        if called:
            step(model, _images())
            step(stock, _images())
        change(model)
        change(stock)
        assert _stem(model).max_pool == pool
        with FusedCalls() as calls:
            found = step(model, _images())
        assert calls.forward == 9
        assert_same(found, step(stock, _images()))


def test_a_hook_that_goes_again() -> None:
    model = _resnet()
    handle = model.maxpool.register_forward_hook(lambda module, args, out: None)
    for _ in range(2):
        step(model, _images())
    handle.remove()
    fresh = copy.deepcopy(model)
    assert_same(step(model, _images()), step(fresh, _images()), factor=0)
    assert _stem(model).max_pool is not None


def test_a_network_saves_neither_what_is_pooled_nor_indices(
    torchvision_or_skip: ModuleType,
) -> None:
    """The bytes per image that pooling by torch took: the activated tensor and eight for each
    index, where now there is one.
    """
    model = torchvision_or_skip.resnet18(num_classes=3).to(memory_format=LAST)
    fastres.convert(model)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=LAST)
    after = saved_bytes(model, lambda: model(x))
    model.maxpool.register_forward_hook(lambda module, args, out: None)
    before = saved_bytes(model, lambda: model(x))
    activated, indices = 2 * 64 * 32 * 32, 2 * 64 * 16 * 16
    assert before - after == 4 * activated + (8 - 1) * indices
