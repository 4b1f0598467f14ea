"""The operators: opcheck, torch.compile, and what autograd must refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres import functional
from fastres.block import Block, Norm, Unit, use_backend, use_memory
from fastres.kernels import BACKENDS, Conv
from fastres.testing import BlockCase, FunctionalBlock

BACKENDS_HERE = [n for n, b in BACKENDS.items() if "cpu" in b.devices and b.why_not() is None]

_THREE = Unit(Conv(padding=(1, 1)), Norm(1e-5), "relu")
_ONE = Unit(Conv(), Norm(1e-5), "none")


def _block(
    backend: str, *, last: bool = True, shape: tuple[int, ...] = (2, 4, 5, 3), save: bool = True,
    batch: bool = True, memory: str = "speed",
) -> tuple[tuple[Any, ...], Block]:  # fmt: skip
    """Arguments of block_forward: 3x3 and 1x1 with a projection."""
    fmt = torch.channels_last if last else torch.contiguous_format
    c = shape[1]
    norm = Norm(1e-5, "batch" if batch else "running")
    units = tuple(u._replace(norm=norm) for u in (_THREE, _ONE))
    spec = Block(units, "input", units[1], act="relu", save=save, memory=memory, backend=backend)
    tensors: list[Tensor | None] = []
    for k in (3, 1, 1):
        w = torch.randn(c, c, k, k).contiguous(memory_format=fmt)
        running = [None, None] if batch else [torch.rand(c), torch.rand(c)]
        tensors += [w, None, torch.rand(c), torch.rand(c), *running, None]
    x = torch.randn(shape).contiguous(memory_format=fmt)
    return (x, None, tensors, spec.encode()), spec


@pytest.mark.grid(5)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (3, 1, 2, 2), (3, 4, 1, 1)], ids=str)
def test_opcheck_of_block(shape: tuple[int, ...], last: bool, backend: str) -> None:
    for more in ({}, {"memory": "lean"}, {"batch": False}, {"batch": False, "save": False}):
        args, spec = _block(backend, last=last, shape=shape, **more)
        torch.library.opcheck(torch.ops.fastres.block_forward.default, args)
        if not spec.save:
            continue
        x, _, tensors, text = args
        out, *saved = torch.ops.fastres.block_forward(*args)
        needs = [True, False] + [
            t is not None for i, t in enumerate(tensors) if i % 7 not in (4, 5)
        ]
        kept = [t if i % 7 == 0 else None for i, t in enumerate(tensors)]
        given = (torch.randn_like(out), None, x, kept, saved, text, needs)
        torch.library.opcheck(torch.ops.fastres.block_backward.default, given)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (3, 1, 2, 2), (2, 4, 1, 1)], ids=str)
def test_opcheck_of_add_act(shape: tuple[int, ...], last: bool, backend: str) -> None:
    fmt = torch.channels_last if last else torch.contiguous_format
    x, r = (torch.randn(shape).contiguous(memory_format=fmt) for _ in range(2))
    for want in (False, True):
        args = (x, r, "relu", want, backend)
        torch.library.opcheck(torch.ops.fastres.add_act.default, args)
    out, mask = torch.ops.fastres.add_act(x, r, "relu", True, backend)
    # Where both layouts are the same memory, the strides decide which one it is, as in forward.
    layout = mask.shape[0] == shape[0] * shape[2] * shape[3] and last
    given = (torch.randn_like(out), mask, "relu", layout, backend)
    torch.library.opcheck(torch.ops.fastres.add_act_backward.default, given)


def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_block_compiles_without_a_graph_break(compiler: str, last: bool) -> None:
    case = BlockCase("compiled", shortcut="projection", stride=2, channels_last=last)
    stock = case.stock()
    x = case.input()
    results = []
    for wrap in (lambda f: f, lambda f: _compiled(f, compiler)):
        module = FunctionalBlock.of(stock)
        given = x.clone().requires_grad_()
        out = wrap(module)(given)
        out.square().sum().backward()
        results.append([out.detach(), given.grad, *(p.grad for p in module.parameters()),
                        *module.buffers()])  # fmt: skip
    for expected, found in zip(*results, strict=True):
        # The operators are the same; inductor may order the sum around them differently.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_single_functions_compile(compiler: str) -> None:
    def function(x: Tensor, r: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = functional.bn_relu(x, mean, var, training=True)
        return functional.add_relu(functional.bn_add_relu(y, r, mean, var), x)

    results = []
    for wrap in (lambda f: f, lambda f: _compiled(f, compiler)):
        torch.manual_seed(0)
        x, r = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
        mean, var = torch.zeros(3), torch.ones(3)
        out = wrap(function)(x, r, mean, var)
        out.sum().backward()
        results.append([out.detach(), x.grad, mean, var])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what autograd must refuse


def _ran(memory: str = "balanced") -> tuple[FunctionalBlock, Tensor, Tensor]:
    case = BlockCase("refused", shortcut="projection")
    module, x = FunctionalBlock.of(case.stock()), case.input().requires_grad_()
    with use_memory(memory):
        return module, x, module(x)


def test_gradients_do_not_share_memory() -> None:
    """The last unit's and the projection's bias have the same gradient, not the same memory."""
    for backend in BACKENDS_HERE:
        with use_backend(backend):
            module, _, out = _ran()
            out.sum().backward()
        places = [p.grad.untyped_storage().data_ptr() for p in module.parameters()]
        assert len(set(places)) == len(places), backend


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_gradients_accumulate(backend: str) -> None:
    case = BlockCase("accumulates", shortcut="projection")
    module, x = FunctionalBlock.of(case.stock()), case.input()
    with use_backend(backend):
        module(x).square().sum().backward()
        once = [p.grad.clone() for p in module.parameters()]
        module(x).square().sum().backward()
    for p, grad in zip(module.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * grad)


def test_second_backward_needs_retain_graph() -> None:
    _, x, out = _ran()
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)
    second = torch.autograd.grad(out.sum(), x)
    assert torch.equal(first[0], second[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), x)


@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
def test_weight_changed_between_forward_and_backward_raises(memory: str) -> None:
    module, _, out = _ran(memory)
    with torch.no_grad():
        module.convs[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_input_changed_between_forward_and_backward_raises() -> None:
    module, x, _ = _ran()
    inner = x * 1
    out = module(inner)
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_running_statistics_are_not_saved_for_backward() -> None:
    """Two forwards in front of one backward, as under DDP, must work in training."""
    module, x, first = _ran()
    second = module(x)
    (first + second).sum().backward()
    assert x.grad is not None


def test_output_may_be_changed_in_place() -> None:
    """The gate is kept as bits: nothing of the output itself is needed."""
    module, x, out = _ran()
    expected = torch.autograd.grad(module(x).mul(2).sum(), x)[0]
    out.mul_(2)
    out.sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_backward_follows_its_own_forward(backend: str) -> None:
    case = BlockCase("follows")
    module, x = FunctionalBlock.of(case.stock()), case.input().requires_grad_()
    with use_backend(backend):
        expected = torch.autograd.grad(module(x).sum(), x)[0]
        out = module(x)
    with use_backend("reference"):
        found = torch.autograd.grad(out.sum(), x)[0]
    assert torch.equal(found, expected)


def test_specification_survives_its_text() -> None:
    for case in (BlockCase("a"), BlockCase("b", shortcut="pooled", stride=2)):
        _, spec = _block("aten")
        pool = FunctionalBlock.of(replace(case, shape=(2, 16, 4, 4)).stock()).pool_spec
        spec = spec._replace(pool=pool)
        from fastres.block import decode

        assert decode(spec.encode()) == spec
