"""The primitives around the convolutions: statistics, normalisation, and their backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.kernels.common import (
    ACT_CODES,
    as_relu,
    branch_tensors,
    floats,
    gate_act_code,
    gate_code,
)
from fastres.kernels.cuda.module import launch, why_not
from fastres.kernels.cuda.tiling import Shape, Tiling, choose, partials
from fastres.kernels.pointwise import Gradients, Normalisation, Pointwise
from fastres.kernels.types import Branch, Gate


class Launches:
    """Launches of the kernels of `csrc/cuda`."""

    def channel_stats(self, y: Tensor, state: Tensor | None, prior_count: int) -> Tensor:
        """(mean, M2), merged with `state` by the launch that joins the partial results."""
        merged = floats(2, y.shape[1], device=y.device)
        _statistics(y, (state, prior_count, merged, None, None, 0.0, None))
        return merged

    def finalize_stats(
        self, inputs: Sequence[Tensor | None], count: int, eps: float, stats: Tensor
    ) -> None:
        """`stats`, in float64 from what is stored in float32."""
        state, *others = [as_float(t) for t in inputs]
        launch("finalize_stats", stats, state, count, *others, eps, stats, stats.shape[1])

    def scale_shift_act(self, call: Normalisation) -> None:
        """One pass."""
        y, stats, residual, residual_stats, act, out, mask, in_place = call
        shape = Shape.of(y)

        def run(tiling: Tiling) -> None:
            tensors = (y, stats, residual, residual_stats, out, mask)
            launch("scale_shift_act", y, *tensors, ACT_CODES[act], shape, tiling)

        flags = (stats is None, residual is None, residual_stats is None, act, mask is not None)
        run(choose("scale_shift_act", shape, y.device, flags, None if in_place else run))

    def bn_act_backward_reduce(
        self, grad_out: Tensor, gate: Gate, branches: Sequence[Branch], sums: Tensor | None
    ) -> Tensor:
        """The sums, to which the launch that joins the partial results adds `sums`."""
        gate, shape, device = as_relu(gate), Shape.of(grad_out), grad_out.device
        rows, name = 1 + len(branches), "bn_act_backward_reduce"
        inputs = backward_inputs(grad_out, gate, branches)

        def run(tiling: Tiling) -> Tensor:
            total = floats(3, shape.c, device=device)
            parts = partials(shape, tiling, rows, torch.float32, device)
            launch(name, grad_out, *inputs, parts, sums, total, shape, tiling)
            return total

        flags = (gate.kind, gate.applied, rows)
        return run(choose(name, shape, device, flags, run, sums=True, pipelines=True))

    def bn_act_backward_apply(self, call: Gradients) -> None:
        """One pass for both branches and the residual."""
        grad_out, gate, branches, sums, count, grads, residual, in_place = call
        gate, shape, name = as_relu(gate), Shape.of(grad_out), "bn_act_backward_apply"
        inputs = backward_inputs(grad_out, gate, branches)

        def run(tiling: Tiling) -> None:
            launch(name, grad_out, *inputs, sums, count, *grads, residual, shape, tiling)

        absent = [t is None for t in (sums, *grads, residual)]
        flags: tuple[str | bool, ...] = (gate.kind, gate.applied, *absent)
        repeatable = None if in_place else run
        run(choose(name, shape, grad_out.device, flags, repeatable, pipelines=True))


def batch_stats(y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`stats` float32 [5, C] of y as a batch; weight and bias dense, in float32."""
    if y.numel() == 0:
        return finalize_stats(channel_stats(y), 0, None, weight, bias, eps, acc=torch.float32)
    stats = floats(5, y.shape[1], device=y.device)
    _statistics(y, (None, 0, None, weight, bias, eps, stats))
    return stats


def _statistics(y: Tensor, wanted: tuple[Tensor | float | None, ...]) -> None:
    """Launch the reduction; `wanted` says what to join, and what to make of it."""
    shape = Shape.of(y)

    def run(tiling: Tiling) -> None:
        parts = partials(shape, tiling, 2, torch.float64, y.device)
        launch("channel_stats", y, y, parts, *wanted, shape, tiling)

    run(choose("channel_stats", shape, y.device, (), run, sums=True))


def as_float(t: Tensor | None) -> Tensor | None:
    """A parameter as the kernels read it: dense, in float32."""
    return None if t is None else t.to(torch.float32).contiguous()


def backward_inputs(
    grad_out: Tensor, gate: Gate, branches: Sequence[Branch]
) -> tuple[Tensor | int | None, ...]:
    """How the backward kernels are told what they read."""
    codes = (gate_code(gate), gate_act_code(gate))
    return grad_out, *codes, gate.tensor, *branch_tensors(branches)


launches = Launches()
_primitives = Pointwise("cuda", launches, why_not)
channel_stats, finalize_stats = _primitives.channel_stats, _primitives.finalize_stats
scale_shift_act = _primitives.scale_shift_act
bn_act_backward_reduce = _primitives.bn_act_backward_reduce
bn_act_backward_apply = _primitives.bn_act_backward_apply
