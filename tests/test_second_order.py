"""Gradients of gradients, and gradients by the batch: through a second forward of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_parity import FusedCalls, randomise
from torch import Tensor, nn

import fastres
from fastres.nn import stock

MODES = pytest.mark.parametrize("train", [True, False])


def twins(kind: str, train: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    """A fused block, its stock twin and an input, in float64."""
    torch.manual_seed(1)
    if kind == "bn":
        made: list[Any] = [fastres.nn.BNReLU(6), nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())]
        state = randomise(made[0]).bn.state_dict()
        made[1][0].load_state_dict(state)
    else:
        name = "BasicBlock" if kind == "basic" else "Bottleneck"
        out = 4 * getattr(stock, name).expansion
        made = []
        for module in (fastres, stock):
            down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(6, out, 1), nn.BatchNorm2d(out))
            given = (6, 4, 2, down) if kind != "identity" else (16, 4)
            made.append(getattr(module, name)(*given))
        made[1].load_state_dict(randomise(made[0]).state_dict())
    x = torch.randn(3, 16 if kind == "identity" else 6, 4, 4, dtype=torch.float64)
    return made[0].double().train(train), made[1].double().train(train), x


KINDS = pytest.mark.parametrize("kind", ["bn", "basic", "pooled", "identity"])


@MODES
@KINDS
@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
def test_a_gradient_penalty(kind: str, train: bool, memory: str) -> None:
    found = []
    for module in twins(kind, train)[:2]:
        x = twins(kind, train)[2].requires_grad_()
        with FusedCalls() as calls, fastres.use_memory(memory):
            (grad,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
            (grad.flatten(1).norm(dim=1) - 1).square().sum().backward()
        assert calls.forward == (not found), "forward is fused, and runs once"
        found.append([grad, x.grad, *[p.grad for p in module.parameters()], *module.buffers()])
    for ours, own in zip(*found, strict=True):
        # A bias does not move the penalty: torch says None, or zeros where the path touched it.
        own = torch.zeros_like(ours) if own is None and ours is not None else own
        ours = torch.zeros_like(own) if ours is None and own is not None else ours
        if own is not None:
            torch.testing.assert_close(ours, own)


@MODES
def test_gradients_of_gradients_are_right(train: bool) -> None:
    fused, _, x = twins("basic", train)
    fused.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda x: fused(x).square(), x[:2].requires_grad_())


@MODES
def test_frozen_parameters(train: bool) -> None:
    found = []
    for module in twins("pooled", train)[:2]:
        for name, p in module.named_parameters():
            p.requires_grad_(name == "conv2.weight")
        weight, x = module.conv2.weight, twins("pooled", train)[2]
        (grad,) = torch.autograd.grad(module(x).square().sum(), weight, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.square().sum(), weight)))
    torch.testing.assert_close(*found)


def test_a_parameter_changed_before_the_second_backward_raises() -> None:
    fused, _, x = twins("identity", True)
    (grad,) = torch.autograd.grad(fused(x.requires_grad_()).sum(), x, create_graph=True)
    with torch.no_grad():
        fused.conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad.square().sum().backward()


def _batched_by_autograd(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = f(x)
    basis = torch.eye(y.numel(), dtype=x.dtype).view(-1, *y.shape)
    return torch.autograd.grad(y, x, basis, is_grads_batched=True)[0]


def _batched_by_vmap(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = f(x)
    basis = torch.eye(y.numel(), dtype=x.dtype).view(-1, *y.shape)
    return torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(basis)


def _jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(f, x, vectorize=True)


def _hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x)


def _vectorised_hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x, vectorize=True)


@MODES
@KINDS
@pytest.mark.parametrize(
    "run", [_batched_by_autograd, _batched_by_vmap, _jacobian, _hessian, _vectorised_hessian]
)
def test_gradients_by_the_batch(run: Callable[..., Tensor], kind: str, train: bool) -> None:
    """Vectorised Jacobians found no batching rule for the fused backward."""
    fused, twin, x = twins(kind, train)
    x = x[:, :, :2, :2].clone()
    results = [
        run(lambda x, m=m: m(x).mean((2, 3))[:, :3], x.clone().requires_grad_())
        for m in (fused, twin)
    ]
    torch.testing.assert_close(*results)
