"""The autograd Function that runs any block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.block import library
from fastres.block.once import once_differentiable
from fastres.block.spec import UNIT_TENSORS, Block

#: Of a unit's tensors, these may want a gradient: all but the running statistics.
_WANTING = (True, True, True, True, False, False, True)

#: Their places: those that a backward reads.
_WEIGHT, _BIAS, _FACTOR = 0, 1, 6

#: What follows a forward: the update of running statistics from those of the batch, per norm.
Update = Callable[[Sequence[Tensor]], None]


class _BlockFunction(torch.autograd.Function):
    """out, *more = block(x, residual, *tensors), `more` being what `run_block` returns.

    Saves only what goes through `save_for_backward`, so that a tensor changed in place between
    forward and backward raises torch's own error; running statistics are never saved, and of the
    parameters only those that a gradient is computed from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: str,
        outputs: tuple[int, int],
        bias: int,
        update: Update | None,
        x: Tensor,
        residual: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        means, norms = outputs
        out, *rest = library.forward(x, residual, tensors, spec)
        mean, saved = rest[:means], rest[means:]
        stats = saved[:norms]
        if update is not None:
            update(stats)
        ctx.spec, ctx.means, ctx.tensors = spec, means, len(tensors)
        read = [i % UNIT_TENSORS in (_WEIGHT, _FACTOR) or i == bias for i in range(len(tensors))]
        kept = [t if reads else None for t, reads in zip(tensors, read, strict=True)]
        ctx.save_for_backward(x, *kept, *saved, *[out for _ in mean])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats)
        return (out, *mean, *stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, *more: Any) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        grad_mean = more[0] if ctx.means else None
        wanted = ctx.needs_input_grad[4:]
        if grad_out is None:
            if grad_mean is None:
                return (None, None, None, None, *[None for _ in wanted])
            grad_out = torch.zeros_like(rest[-1])
        tensors, saved = rest[: ctx.tensors], rest[ctx.tensors :]
        needs = [*wanted[:2]]
        for i in range(2, len(wanted), UNIT_TENSORS):
            unit = wanted[i : i + UNIT_TENSORS]
            needs += [want for want, may in zip(unit, _WANTING, strict=True) if may]
        grads = iter(library.backward(grad_out, grad_mean, x, tensors, saved, ctx.spec, needs))
        return (None, None, None, None, *[next(grads) if want else None for want in wanted])


def run_block(
    block: Block,
    x: Tensor,
    residual: Tensor | None,
    tensors: Sequence[Tensor | None],
    update: Update,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Run a block under autograd.

    Args:
        block: what to compute; `block.save` says whether a backward may follow.
        x: [N, C, H, W].
        residual: shape of the output, for the "tensor" shortcut.
        tensors: seven per unit, see `fastres.block.UnitTensors`.
        update: called once with the stats [5, K] of each unit that has a norm.
            Activation checkpointing ends a recomputation where the last tensor is saved, so in
            eager mode it is called before that; a compiler wants mutations outside the autograd
            Function.

    Returns:
        The block's output, and what else it left: with an open end the mean of what it stands for,
        [N, K]; then the stats.
    """
    line = block.encode()
    means, norms = int(block.open_end), sum([unit.norm is not None for unit in block.all_units])
    bias = UNIT_TENSORS * (len(block.units) - 1) + _BIAS if block.recomputes_last else -1
    function = (line, (means, norms), bias)
    if not block.save:
        out, *more = library.forward(x, residual, tensors, line)
    elif not torch.compiler.is_compiling():
        out, *more = _BlockFunction.apply(*function, update, x, residual, *tensors)  # type: ignore[no-untyped-call]
        return out, more
    else:
        out, *more = _BlockFunction.apply(*function, None, x, residual, *tensors)  # type: ignore[no-untyped-call]
    more = more[: means + norms]
    update(more[means:])
    return out, more
