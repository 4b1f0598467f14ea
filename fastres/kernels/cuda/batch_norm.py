"""The primitives around the convolutions: statistics, normalisation, and their backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.kernels.common import (
    ACT_CODES,
    address,
    as_relu,
    branch_tensors,
    floats,
    gate_act_code,
    gate_code,
)
from fastres.kernels.cuda.module import module, where, why_not
from fastres.kernels.cuda.tiling import Shape, Tiling, choose, partials
from fastres.kernels.pointwise import Gradients, Normalisation, Pointwise
from fastres.kernels.types import Branch, Gate


class Launches:
    """Launches of the kernels of `csrc/cuda`."""

    def channel_stats(self, y: Tensor, state: Tensor | None, prior_count: int) -> Tensor:
        """(mean, M2), merged with `state` by the launch that joins the partial results."""
        merged = floats(2, y.shape[1], device=y.device)
        _statistics(y, (address(state), prior_count, merged.data_ptr(), 0, 0, 0.0, 0))
        return merged

    def finalize_stats(
        self, inputs: Sequence[Tensor | None], count: int, eps: float, stats: Tensor
    ) -> None:
        """`stats`, in float64 from what is stored in float32."""
        dense = [as_float(t) for t in inputs]
        state, *others = map(address, dense)
        channels = stats.shape[1]
        module().finalize_stats(
            state, count, *others, eps, stats.data_ptr(), channels, where(stats)
        )

    def scale_shift_act(self, call: Normalisation) -> None:
        """One pass."""
        y, stats, residual, residual_stats, act, out, mask, in_place = call
        shape = Shape.of(y)

        def run(tiling: Tiling) -> None:
            module().scale_shift_act(
                y.data_ptr(), address(stats), address(residual), address(residual_stats),
                out.data_ptr(), address(mask), ACT_CODES[act], shape, tiling, where(y),
            )  # fmt: skip

        flags = (stats is None, residual is None, residual_stats is None, act, mask is not None)
        run(choose("scale_shift_act", shape, y.device, flags, None if in_place else run))

    def bn_act_backward_reduce(
        self, grad_out: Tensor, gate: Gate, branches: Sequence[Branch], sums: Tensor | None
    ) -> Tensor:
        """The sums, to which the launch that joins the partial results adds `sums`."""
        gate, shape, device = as_relu(gate), Shape.of(grad_out), grad_out.device
        rows = 1 + len(branches)

        def run(tiling: Tiling) -> Tensor:
            total = floats(3, shape.c, device=device)
            parts = partials(shape, tiling, rows, torch.float32, device)
            module().bn_act_backward_reduce(
                *backward_inputs(grad_out, gate, branches), parts.data_ptr(), address(sums),
                total.data_ptr(), shape, tiling, where(grad_out),
            )  # fmt: skip
            return total

        flags, name = (gate.kind, gate.applied, rows), "bn_act_backward_reduce"
        return run(choose(name, shape, device, flags, run, sums=True, pipelines=True))

    def bn_act_backward_apply(self, call: Gradients) -> None:
        """One pass for both branches and the residual."""
        grad_out, gate, branches, sums, count, grads, residual, in_place = call
        gate, shape = as_relu(gate), Shape.of(grad_out)

        def run(tiling: Tiling) -> None:
            module().bn_act_backward_apply(
                *backward_inputs(grad_out, gate, branches), address(sums), count,
                *map(address, (*grads, residual)), shape, tiling, where(grad_out),
            )  # fmt: skip

        absent = [t is None for t in (sums, *grads, residual)]
        flags: tuple[str | bool, ...] = (gate.kind, gate.applied, *absent)
        repeatable, name = None if in_place else run, "bn_act_backward_apply"
        run(choose(name, shape, grad_out.device, flags, repeatable, pipelines=True))


def batch_stats(y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`stats` float32 [5, C] of y as a batch; weight and bias dense, in float32."""
    if y.numel() == 0:
        return finalize_stats(channel_stats(y), 0, None, weight, bias, eps, acc=torch.float32)
    stats = floats(5, y.shape[1], device=y.device)
    _statistics(y, (0, 0, 0, address(weight), address(bias), eps, stats.data_ptr()))
    return stats


def _statistics(y: Tensor, wanted: tuple[float, ...]) -> None:
    """Launch the reduction; `wanted` says what to join, and what to make of it."""
    shape = Shape.of(y)

    def run(tiling: Tiling) -> None:
        parts = partials(shape, tiling, 2, torch.float64, y.device)
        module().channel_stats(y.data_ptr(), parts.data_ptr(), *wanted, shape, tiling, where(y))

    run(choose("channel_stats", shape, y.device, (), run, sums=True))


def as_float(t: Tensor | None) -> Tensor | None:
    """A parameter as the kernels read it: dense, in float32."""
    return None if t is None else t.to(torch.float32).contiguous()


def backward_inputs(grad_out: Tensor, gate: Gate, branches: Sequence[Branch]) -> tuple[int, ...]:
    """How the backward kernels are told what they read."""
    tensors = map(address, (gate.tensor, *branch_tensors(branches)))
    return grad_out.data_ptr(), gate_code(gate), gate_act_code(gate), *tensors


launches = Launches()
_primitives = Pointwise("cuda", launches, why_not)
channel_stats, finalize_stats = _primitives.channel_stats, _primitives.finalize_stats
scale_shift_act = _primitives.scale_shift_act
bn_act_backward_reduce = _primitives.bn_act_backward_reduce
bn_act_backward_apply = _primitives.bn_act_backward_apply
