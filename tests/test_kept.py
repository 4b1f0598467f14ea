"""A fused block keeps no more for its backward than the stock one, whatever is frozen in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handwritten import FrozenNorm
from module_parity import assert_same, step
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres.block import Block, Layer, Unit, run_layers
from fastres.block.stock import run_stock
from fastres.kernels import Conv
from fastres.testing import saved_bytes


def _frozen(channels: int) -> nn.Module:
    return FrozenNorm(channels)


def _frozen_with_parameters(channels: int) -> nn.Module:
    """Frozen by its class, which has parameters all the same."""
    norm = FrozenNorm(channels)
    for name in ("weight", "bias"):
        value = norm._buffers.pop(name)
        norm.register_parameter(name, nn.Parameter(value))
    return norm


def _in_evaluation(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels).eval()


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen": _frozen,
    "frozen, with parameters": _frozen_with_parameters,
    "in evaluation": _in_evaluation,
    "of the batch": nn.BatchNorm2d,
}


class _Residual(nn.Module):
    def __init__(self, main: nn.Module, side: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.main, self.side, self.act = main, side, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.main(x) + self.side(x))


class _Added(nn.Module):
    """Adds something else than its input."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + -x)


def _chain(
    norm: Callable[[int], nn.Module], act: Callable[[], nn.Module], *sizes: int
) -> list[nn.Module]:
    """Convolutions of these sizes between 8 channels and 8, or 4 in a bottleneck's middle."""
    wide = [8, *[4 if 1 in sizes else 8] * (len(sizes) - 1), 8]
    return [
        m
        for i, size in enumerate(sizes)
        for m in (
            nn.Conv2d(wide[i], wide[i + 1], size, padding=size // 2, bias=False),
            norm(wide[i + 1]),
            act(),
        )
    ]


def _make(shape: str, norm: Callable[[int], nn.Module], act: Callable[[], nn.Module]) -> nn.Module:
    main = _chain(norm, act, *((1, 3, 1) if shape == "bottleneck" else (3, 3)))
    if shape == "chain":
        return nn.Sequential(*main)
    if shape == "pre-activation":
        lead = nn.Sequential(norm(8), act(), *main[:-2])
        return _Residual(lead, nn.Identity(), nn.Identity())
    if shape == "tensor":
        return _Added(nn.Sequential(*main[:-1]))
    side: nn.Module = nn.Identity()
    if shape == "projection":
        side = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), norm(8))
    return _Residual(nn.Sequential(*main[:-1]), side, act())


SHAPES = ("basic", "bottleneck", "projection", "chain", "pre-activation", "tensor")
#: What is frozen, by the names of parameters and their order in the module.
FREEZES: dict[str, Callable[[str, int, int], bool]] = {
    "nothing": lambda name, i, count: False,
    "norms": lambda name, i, count: not _is_convolution(name),
    "convolutions": lambda name, i, count: _is_convolution(name),
    "the first half": lambda name, i, count: i < count // 2,
    "all but the first": lambda name, i, count: i > 0,
    "all but the last": lambda name, i, count: i < count - 1,
    "biases of norms, and convolutions": lambda name, i, count: not name.endswith("bias"),
    "everything": lambda name, i, count: True,
}
_ACTS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


def _is_convolution(name: str) -> bool:
    return name.endswith("0.weight") or ".3.weight" in name or ".6.weight" in name


def _pair(shape: str, norm: str, frozen: str, act: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = _make(shape, NORMS[norm], _ACTS[act]).double()
    with torch.no_grad():
        for t in (*stock.parameters(), *stock.buffers()):
            if t.dim() == 1:
                t.uniform_(0.5, 1.5)
    parameters = [*stock.named_parameters()]
    for i, (name, p) in enumerate(parameters):
        p.requires_grad_(not FREEZES[frozen](name, i, len(parameters)))
    fused = copy.deepcopy(stock)
    report = fastres.convert(fused)
    assert report.fused, report
    return stock, fused


def _kept(module: nn.Module, x: Tensor) -> int:
    return saved_bytes(module, lambda: module(x))


def _statistics(module: nn.Module) -> int:
    """Bytes that norms keep besides activations: five numbers a channel, of which torch may keep
    none. All together they are less than one activation.
    """
    norms = [m for m in module.modules() if hasattr(m, "running_mean")]
    return sum([5 * 8 * len(m.running_mean) for m in norms])


CASES = [
    pytest.mark.parametrize("shape", SHAPES),
    pytest.mark.parametrize("norm", NORMS),
    pytest.mark.parametrize("frozen", FREEZES),
    pytest.mark.parametrize("act", _ACTS),
]


def _every_case(test: Any) -> Any:
    for mark in CASES:
        test = mark(test)
    return test


def _hold(pair: tuple[nn.Module, nn.Module], x: Tensor) -> None:
    stock, fused = pair
    for wants in (False, True):
        found, expected = [_kept(m, x.clone().requires_grad_(wants)) for m in (fused, stock)]
        assert found <= expected + _statistics(fused), wants
    assert_same(step(fused, x), step(stock, x))


@pytest.mark.grid(5)
@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
@_every_case
def test_no_more_is_kept(shape: str, norm: str, frozen: str, act: str, memory: str) -> None:
    with fastres.use_memory(memory):
        _hold(_pair(shape, norm, frozen, act), torch.randn(4, 8, 8, 8, dtype=torch.float64))


@pytest.mark.grid(5)
@_every_case
def test_no_more_is_kept_in_one_piece(shape: str, norm: str, frozen: str, act: str) -> None:
    """As kernels that are called together keep it, where they are built."""
    stock, fused = [
        m.float().to(memory_format=torch.channels_last) for m in _pair(shape, norm, frozen, act)
    ]
    x = torch.randn(4, 8, 8, 8).to(memory_format=torch.channels_last)
    _hold((stock, fused), x)


def test_what_frozen_norms_keep() -> None:
    """Of the last convolution nothing but the bits of the activation behind the sum."""
    _, fused = _pair("bottleneck", "frozen", "nothing", "relu")
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64)
    pixels = 4 * 8 * 8
    middle, bits, statistics = 2 * 4 * pixels * 8, pixels * 8 // 8, 5 * 8 * (4 + 4 + 8)
    assert _kept(fused, x) == x.nbytes + middle + bits + statistics


def test_what_is_frozen_may_change_between_two_calls() -> None:
    stock, fused = _pair("basic", "in evaluation", "norms", "relu")
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64)
    for frozen in (True, False, True):
        for module in (stock, fused):
            for name, p in module.named_parameters():
                p.requires_grad_(_is_convolution(name) or not frozen)
        assert_same(step(fused, x), step(stock, x))


@pytest.mark.parametrize("memory", ["balanced", "speed", "lean"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("shortcut", ["none", "input"])
def test_convolutions_without_a_norm(shortcut: str, act: str, memory: str) -> None:
    """A raw output that is added as it is is not read; an activation right behind it reads it."""
    torch.manual_seed(0)
    weight, x = torch.randn(6, 6, 3, 3, requires_grad=True), torch.randn(2, 6, 5, 4)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    unit = Unit(Conv((1, 1), (1, 1), (1, 1), 1))
    block, layers = Block((unit, unit), shortcut, act=act), [Layer(unit, weight)] * 2
    found = []
    for run in (run_layers, run_stock):
        with fastres.use_memory(memory):
            out = run(x, block, layers)
            found.append([out, *torch.autograd.grad(out.square().sum(), [x, weight])])
    for ours, stock in zip(*found, strict=True):
        scale = float(stock.detach().abs().max())
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5 * scale)
