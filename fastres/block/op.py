"""The autograd Function that runs any block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.block import library as _library  # noqa: F401  (defines the operators)
from fastres.block.layers import ConvNorm
from fastres.block.once import once_differentiable
from fastres.block.spec import UNIT_TENSORS, BlockSpec, UnitSpec, decode
from fastres.block.stock import run_stock

#: Of a unit's tensors, the first four are parameters; running statistics get no gradient.
_PARAMETERS = 4

#: What follows a forward: the update of running statistics from (out, stats per unit).
Update = Callable[[Tensor, Sequence[Tensor]], None]


class _Block(torch.autograd.Function):
    """out, *stats = block(x, residual, *tensors).

    Saves only what goes through `save_for_backward`, so that a tensor changed in place between
    forward and backward raises torch's own error; running statistics are never saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: str,
        units: int,
        update: Update | None,
        x: Tensor,
        residual: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        out, *saved = torch.ops.fastres.block_forward(x, residual, list(tensors), spec)
        if update is not None:
            update(out, saved[:units])
        ctx.spec, ctx.units = spec, units
        parameters = [t for i, t in enumerate(tensors) if i % UNIT_TENSORS < _PARAMETERS]
        ctx.save_for_backward(x, *parameters, *saved)
        stats = saved[:units]
        ctx.mark_non_differentiable(*stats)
        return (out, *stats)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        run = _torch_backward if _takes_torch(ctx, grad_out) else _Block.fused_backward
        return run(ctx, grad_out)

    @staticmethod
    @once_differentiable
    def fused_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by the fused operator."""
        x, *rest = ctx.saved_tensors
        parameters, saved = rest[: _PARAMETERS * ctx.units], rest[_PARAMETERS * ctx.units :]
        tensors: list[Tensor | None] = []
        for i in range(0, len(parameters), _PARAMETERS):
            tensors += [*parameters[i : i + _PARAMETERS], None, None]
        wanted = ctx.needs_input_grad[3:]
        needs = [wanted[0], wanted[1]]
        for i in range(2, len(wanted), UNIT_TENSORS):
            needs += wanted[i : i + _PARAMETERS]
        grads = iter(torch.ops.fastres.block_backward(grad_out, x, tensors, saved, ctx.spec, needs))
        return (None, None, None, *(next(grads) if want else None for want in wanted))


def _takes_torch(ctx: Any, grad_out: Tensor) -> bool:
    """Whether torch's own operators run backward: for gradients of gradients, or a batch of them.

    A residual that was given is not kept, and so the forward cannot be run again.
    """
    if torch.compiler.is_compiling() or decode(ctx.spec).shortcut == "tensor":
        return False
    batches = torch._C._functorch
    batched = batches.is_batchedtensor(grad_out) or batches.is_legacy_batchedtensor(grad_out)
    return torch.is_grad_enabled() or batched


def _torch_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by torch, through a second forward of its own operators."""
    spec, (x, *rest) = decode(ctx.spec), ctx.saved_tensors
    units, given, layers = spec.all_units, [x, None], []
    for i, unit in enumerate(units):
        own = rest[_PARAMETERS * i :][:_PARAMETERS]
        given += [*own, None, None]
        layers.append(_layer(unit, own, rest[_PARAMETERS * len(units) + i]))
    main, projection = layers[: len(spec.units)], layers[len(spec.units) :]
    with torch.enable_grad():
        out = run_stock(
            x, main, shortcut=spec.shortcut, projection=projection[0] if projection else None,
            pool=spec.pool, act=spec.act,
        )  # fmt: skip
    wanted = ctx.needs_input_grad[3:]
    inputs = [t for t, want in zip(given, wanted, strict=True) if want and t is not None]
    create = torch.is_grad_enabled()
    grads = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=create))
    return (None, None, None, *(next(grads) if want else None for want in wanted))


def _layer(unit: UnitSpec, own: Sequence[Tensor | None], stats: Tensor) -> ConvNorm:
    """A unit as torch's operators take it: its running statistics are those it was given."""
    weight, bias, norm_weight, norm_bias = own
    dtype = stats.dtype if norm_weight is None else norm_weight.dtype
    mean, var = (None, None) if unit.batch_stats else stats[:2].to(dtype).unbind()
    layer = ConvNorm(weight, mean, var, norm_weight, norm_bias, bias, eps=unit.eps, act=unit.act)
    return layer if unit.conv is None else layer._replace(**unit.conv._asdict())


def run_block(
    spec: BlockSpec,
    x: Tensor,
    residual: Tensor | None,
    tensors: Sequence[Tensor | None],
    update: Update,
) -> Tensor:
    """Run a block under autograd.

    Args:
        spec: what to compute; `spec.save` says whether a backward may follow.
        x: [N, C, H, W].
        residual: shape of the output, for the "tensor" shortcut.
        tensors: six per unit, see `fastres.block.UnitTensors`.
        update: called once with the output and the stats [5, K] of each unit. Activation
            checkpointing ends a recomputation where the last tensor is saved, so in eager mode it
            is called before that; a compiler wants mutations outside the autograd Function.

    Returns:
        The block's output.
    """
    units, line = len(spec.all_units), spec.encode()
    if not spec.save:
        out, *stats = torch.ops.fastres.block_forward(x, residual, list(tensors), line)
    elif not torch.compiler.is_compiling():
        return _Block.apply(line, units, update, x, residual, *tensors)[0]  # type: ignore[no-any-return,no-untyped-call]
    else:
        out, *stats = _Block.apply(line, units, None, x, residual, *tensors)  # type: ignore[no-untyped-call]
    update(out, stats[:units])
    return out
