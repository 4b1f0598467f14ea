"""Norms that are frozen by their class are known by what their forward computes."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handwritten import FrozenNorm, Textbook
from module_parity import FusedCalls, assert_same, assert_two_x, step
from torch import Tensor, nn
from torch.nn import functional as F

import fastres


def _of_library(module: str, name: str) -> Callable[[int], nn.Module]:
    def make(channels: int) -> nn.Module:
        from conftest import load_torchvision

        with contextlib.suppress(ImportError):
            load_torchvision()
        pytest.importorskip(module.partition(".")[0])
        return getattr(importlib.import_module(module), name)(channels)

    return make


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "detectron2": FrozenNorm,
    "torchvision": _of_library("torchvision.ops.misc", "FrozenBatchNorm2d"),
    "timm": _of_library("timm.layers.norm_act", "FrozenBatchNorm2d"),
    "timm-act": _of_library("timm.layers", "FrozenBatchNormAct2d"),
    "transformers": _of_library("transformers.models.detr.modeling_detr", "DetrFrozenBatchNorm2d"),
}
KINDS = pytest.mark.parametrize("kind", NORMS)


def randomised(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
            getattr(norm, name).uniform_(low, low + 1)
        norm.running_var.uniform_(0.5, 2)
    return norm


class _Block(Textbook):
    """Adds out of place: a norm may end in a ReLU, whose output must not change."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def block(make: Callable[[int], nn.Module]) -> nn.Module:
    """A block with a projection, all of whose norms are of one kind."""
    made = _Block(4, 6, 2)
    made.bn1, made.bn2 = randomised(make(6)), randomised(make(6))
    made.shortcut[1] = randomised(make(6))
    return made.double()


def twins(make: Callable[[int], nn.Module]) -> tuple[Any, Any]:
    stock = block(make)
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    return fused, stock


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 4, 7, 7, dtype=dtype)


def calls_of(fused: nn.Module) -> int:
    with FusedCalls() as calls, torch.no_grad():
        fused(images())
    return calls.forward


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@KINDS
def test_parity(kind: str, dtype: torch.dtype, mode: str) -> None:
    fused, stock = [m.to(dtype).train(mode == "train") for m in twins(NORMS[kind])]
    x = images(dtype)
    with FusedCalls() as calls:
        found = step(fused, x, backward=mode != "inference")
    # A norm with an activation on the shortcut is no projection: that is a chain of its own.
    assert calls.forward == (2 if kind == "timm-act" else 1)
    assert_same(found, step(stock, x, backward=mode != "inference"))


@KINDS
def test_lower_precision(kind: str) -> None:
    """Some forwards give float32 for it, and some keep it: fused is what keeps it."""
    fused, stock = [m.float() for m in twins(NORMS[kind])]
    truth, x = copy.deepcopy(stock).double(), images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with FusedCalls() as calls:
            found = step(fused, x)
        expected = step(stock, x)
    assert calls.forward == int(kind == "detectron2")
    assert found["out"].dtype == expected["out"].dtype
    assert_two_x(found, expected, step(truth, x.double()))


@KINDS
def test_wanted_gradients(kind: str) -> None:
    """As parameters, weight and bias are trained; running statistics that are are left to torch."""
    stock = block(NORMS[kind])
    for norm in (stock.bn1, stock.bn2):
        for name in ("weight", "bias"):
            value = norm._buffers.pop(name)
            norm.register_parameter(name, nn.Parameter(value))
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    assert calls_of(fused) == (2 if kind == "timm-act" else 1)
    found = step(fused, x)
    assert "grad bn1.weight" in found
    assert_same(found, step(stock, x))
    for module in (fused, stock):
        module.bn2.running_mean.requires_grad_()
    assert_same(step(fused, x), step(stock, x))
    torch.testing.assert_close(fused.bn2.running_mean.grad, stock.bn2.running_mean.grad)


def test_an_eps_of_zero() -> None:
    """Detectors of torchvision are trained with it."""
    fused, stock = twins(lambda channels: FrozenNorm(channels, eps=0.0))
    x = images()
    assert calls_of(fused) == 1
    assert_same(step(fused, x), step(stock, x))


# ---------------------------------------------------------------- what changes afterwards


def _eps(module: Any) -> None:
    module.bn1.eps = 0.5


def _hook(module: Any) -> None:
    module.bn1.register_forward_hook(lambda m, args, out: out * 2)


def _forward_of_the_norm(module: Any) -> None:
    module.bn1.forward = lambda x: x + 1


def _moved(module: Any) -> None:
    module.bn1.running_mean = module.bn1.running_mean + 1


def _tensor(module: Any) -> None:
    module.bn1.eps = torch.tensor(0.5, dtype=torch.float64)


def _other_class(module: Any) -> None:
    module.bn1.__class__ = _Twice


class _Twice(FrozenNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "change",
    [_eps, _hook, _forward_of_the_norm, _moved, _tensor, _other_class],
    ids=lambda f: f.__name__,
)
def test_changes(change: Callable[[Any], None]) -> None:
    fused, stock = twins(FrozenNorm)
    x = images()
    assert_same(step(fused, x), step(stock, x))
    change(fused), change(stock)
    for train in (True, False):
        assert_same(step(fused.train(train), x), step(stock.train(train), x))


def test_the_forward_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, stock = twins(FrozenNorm)
    x = images()
    before = step(stock, x)
    assert_same(step(fused, x), before)
    with monkeypatch.context() as patched:
        patched.setattr(FrozenNorm, "forward", lambda self, x: x * self.weight.view(1, -1, 1, 1))
        found = step(fused, x)
        assert_same(found, step(stock, x))
        assert not torch.equal(found["out"], before["out"])
        # A conversion at such a moment must not take it for the formula either.
        later, other = twins(FrozenNorm)
        assert_same(step(later, x), step(other, x))
    assert_same(step(later, x), step(other, x))
    assert_same(step(fused, x), before)
    assert calls_of(fused) == 1


# ---------------------------------------------------------------- what only looks like one


class _Clamped(FrozenNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1e3, 1e3)


class _EpsOutside(FrozenNorm):
    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var.rsqrt() + self.eps)).view(1, -1, 1, 1)
        return (x - self.running_mean.view(1, -1, 1, 1)) * scale + self.bias.view(1, -1, 1, 1)


class _OnePlusWeight(FrozenNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, 1 + self.weight, self.bias, False, 0.0, self.eps
        )


class _Trains(FrozenNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            0.1, self.eps,
        )  # fmt: skip


class _ReadsMore(FrozenNorm):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.factor * self.weight * (self.running_var + self.eps).rsqrt()).view(
            1, -1, 1, 1
        )
        shift = self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale
        return x * scale + shift


class _Calls(FrozenNorm):
    def __call__(self, x: Tensor) -> Tensor:
        return 3 * super().__call__(x)


class _OverRows(FrozenNorm):
    """The same for square images of as many pixels as channels."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, 1, -1, 1) + shift.view(1, 1, -1, 1)


@pytest.mark.parametrize(
    "cls",
    [_Clamped, _EpsOutside, _OnePlusWeight, _Trains, _ReadsMore, _Calls, _OverRows],
    ids=lambda cls: cls.__name__,
)
def test_what_only_looks_like_one(cls: type[nn.Module]) -> None:
    stock = nn.Sequential(
        nn.Conv2d(4, 5, 3), randomised(cls(5)), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)
    ).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    if cls is _ReadsMore:
        fused[1].factor = stock[1].factor = 2.0
    x = images()
    for train in (True, False):
        assert_same(step(fused.train(train), x), step(stock.train(train), x))


def test_a_shared_norm() -> None:
    stock: Any = block(FrozenNorm)
    stock.bn2 = stock.bn1
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    assert calls_of(fused) == 1
    assert_same(step(fused, x), step(stock, x))


def test_a_batch_norm_in_evaluation_within_training() -> None:
    stock: Any = Textbook(4, 6, 2).double()
    for norm in (stock.bn1, stock.bn2, stock.shortcut[1]):
        randomised(norm)
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    for names in (("bn1", "shortcut.1"), ("bn2",), ("bn1", "bn2", "shortcut.1")):
        for module in (fused, stock):
            module.train()
            for name in names:
                module.get_submodule(name).eval()
        with FusedCalls() as calls:
            found = step(fused, x)
        assert calls.forward == 1
        assert_same(found, step(stock, x))
