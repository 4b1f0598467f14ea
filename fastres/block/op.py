"""The autograd Function that runs any block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.block import library as _library  # noqa: F401  (defines the operators)
from fastres.block.once import once_differentiable
from fastres.block.spec import UNIT_TENSORS, BlockSpec

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
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
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
