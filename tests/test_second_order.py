"""Gradients of gradients, and gradients by the batch: through a second forward of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import CLASSIC, RANDOM, SPARSE, Kind, kind
from kinds import KINDS as BLOCKS
from module_parity import FusedCalls, randomise
from torch import Tensor, nn
from torch.nn import functional as F

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


ALL = pytest.mark.parametrize("each", [*CLASSIC, *BLOCKS, *SPARSE, *RANDOM], ids=str)


def seeded(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module that draws the same numbers in each call."""

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = module(x)
        return out

    return run


@MODES
@ALL
def test_a_gradient_penalty_of_each_kind(each: Kind, train: bool) -> None:
    """WGAN-GP's step: dropout, gates, open ends and given residuals among the blocks."""
    found = []
    for module in each.pair(torch.float64, training=train):
        x = each.input(torch.float64, shape=(3, 5, 4))
        with FusedCalls() as calls:
            out = seeded(module)(x)
            (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
            ((grad.flatten(1).norm(dim=1) - 1).square().sum() + out.mean()).backward()
        assert bool(calls.forward) is bool(found) and calls.backward <= calls.forward
        found.append([grad, x.grad, *[p.grad for p in module.parameters()]])
    for own, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-8, atol=1e-8)


@MODES
@pytest.mark.parametrize(
    "name", ["basic", "bottleneck-pooled", "preact-basic-activated", "wide-dropout", "se-basic",
             "eca-bottleneck-pooled", "drop-path", "se-drop-path", "no-norms-se"]
)  # fmt: skip
def test_gradients_of_gradients_are_right(name: str, train: bool) -> None:
    """Against finite differences, of the input and the parameters."""
    _, block = kind(name).pair(torch.float64, training=train)
    names = [n for n, _ in block.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(6)
        given = dict(zip(names, values, strict=True))
        out: Tensor = torch.func.functional_call(block, given, (x,))
        return out.square()

    x = kind(name).input(torch.float64, shape=(3, 4, 3))
    assert block.why_not(x) is None
    inputs = (x, *(p.detach().clone().requires_grad_() for p in block.parameters()))
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("power", [1, 2], ids=["linear", "quadratic"])
@pytest.mark.parametrize("name", ["bn_add_relu", "add_relu", "bn_relu"])
def test_functions(name: str, power: int) -> None:
    """Also where grad_out is a constant: a gradient penalty must not vanish silently."""
    from fastres import functional

    weight = (torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_()
    pair: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "bn_add_relu": (
            lambda x, r: functional.bn_add_relu(x, r, None, None, weight, training=True),
            lambda x, r: F.relu(F.batch_norm(x, None, None, weight, training=True) + r),
        ),
        "bn_relu": (
            lambda x, r: functional.bn_relu(x, None, None, weight, training=True) * r,
            lambda x, r: F.relu(F.batch_norm(x, None, None, weight, training=True)) * r,
        ),
        "add_relu": (
            lambda x, r: functional.add_relu(x * weight.sum(), r),
            lambda x, r: F.relu(x * weight.sum() + r),
        ),
    }
    found = []
    for f in pair[name]:
        g = torch.Generator().manual_seed(1)
        x, r = (torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=g).requires_grad_()
                for _ in range(2))  # fmt: skip
        out = f(x, r)
        first = torch.autograd.grad(out.pow(power).sum(), (x, r, weight), create_graph=True)
        loss = sum([grad.square().sum() for grad in first]) + out.mean()
        found.append((*first, *torch.autograd.grad(loss, (x, r, weight))))
    for ours, own in zip(*found, strict=True):
        torch.testing.assert_close(ours, own)


@ALL
def test_gradients_by_the_batch_of_each_kind(each: Kind) -> None:
    results = []
    for module in each.pair(torch.float64):
        x = each.input(torch.float64, shape=(3, 3, 2))
        y = seeded(module)(x).mean((2, 3))[:, :2]
        basis = torch.eye(y.numel(), dtype=x.dtype).view(-1, *y.shape)
        results.append(torch.autograd.grad(y, x, basis, is_grads_batched=True)[0])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("create", [True, False])
def test_a_parameter_that_is_computed_from_the_input(create: bool) -> None:
    """A network that makes another's weights: a path is not counted twice."""
    results = []
    for module in kind("basic").pair(torch.float64):
        x = kind("basic").input(torch.float64)
        scale = x.square().mean()
        given = {name: p * scale for name, p in module.named_parameters()}
        out = torch.func.functional_call(module, given, (x,)).square().sum()
        results.append(torch.autograd.grad(out, (x, given["conv2.weight"]), create_graph=create))
        if create:
            results[-1] += torch.autograd.grad(results[-1][0].square().sum(), x)
    for own, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, own)


@MODES
@pytest.mark.parametrize("name", ["basic", "bottleneck-pooled", "preact-basic"])
def test_what_a_penalty_does_not_move_has_the_gradient_that_torch_gives_it(
    name: str, train: bool
) -> None:
    """Zero is not None to an optimizer with weight decay."""
    found = []
    for module in kind(name).pair(torch.float64, training=train):
        x = kind(name).input(torch.float64)
        (grad,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append({n for n, p in module.named_parameters() if p.grad is not None})
    assert found[1] >= found[0]


def test_a_step_of_meta_learning() -> None:
    """MAML: the loss behind a step of gradient descent, by the parameters in front of it."""
    results = []
    for module in kind("se-basic").pair(torch.float64):
        x = kind("se-basic").input(torch.float64).detach()
        names, values = zip(*module.named_parameters(), strict=True)

        def loss(values: Any, module: nn.Module = module, names: Any = names, x: Any = x) -> Any:
            given = dict(zip(names, values, strict=True))
            return torch.func.functional_call(module, given, (x,)).square().mean()

        grads = torch.autograd.grad(loss(values), values, create_graph=True)
        moved = [v - 0.1 * g for v, g in zip(values, grads, strict=True)]
        results.append(torch.autograd.grad(loss(moved), values))
    for own, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, own)


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
