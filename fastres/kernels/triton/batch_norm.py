"""The primitives around the convolutions: statistics, normalisation, and their backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.kernels.common import branch_tensors, floats
from fastres.kernels.pointwise import Gradients, Normalisation, Pointwise
from fastres.kernels.triton.activation import gate_flags, output_flags
from fastres.kernels.triton.launch import kernels, launch
from fastres.kernels.triton.support import Matrix, why_not
from fastres.kernels.triton.tiling import (
    SEVERAL,
    choose_tiling,
    launch_elementwise,
    launch_tiled,
    partials_of,
)
from fastres.kernels.types import Branch, Gate

#: Channels of one program of the finalising kernel.
_FINALIZE_BLOCK = 128


class Launches:
    """Launches of the kernels of `fastres.triton_kernels`; the first imports Triton."""

    def channel_stats(self, y: Tensor, state: Tensor | None, prior_count: int) -> Tensor:
        """(mean, M2) out of partial results, of which `state` is the last."""
        kernel, m = kernels().channel_stats.channel_stats_fwd_kernel, Matrix.of(y)

        def run(tiling: object) -> tuple[Tensor, Tensor]:
            extra = state is not None and prior_count > 0
            count = partials_of(m, tiling)
            partials = floats(count + extra, 3, m.channels, device=y.device)
            counts = floats(count + extra, device=y.device)
            launch_tiled(kernel, m, tiling, (y, partials, counts), {})
            if state is not None and extra:
                partials[-1, ::2].copy_(state)
                partials[-1, 1].zero_()
                counts[-1:].fill_(prior_count)
            return partials, counts

        return merge_stats(*run(choose_tiling(kernel, m, (y,), {}, run, SEVERAL)))

    def finalize_stats(
        self, inputs: Sequence[Tensor | None], count: int, eps: float, stats: Tensor
    ) -> None:
        """`stats`, in float64."""
        state, _, _, weight, bias = inputs
        constants = {
            "HAS_STATE": state is not None,
            "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": bias is not None,
            "BLOCK": _FINALIZE_BLOCK,
        }
        channels = stats.shape[1]
        grid, sizes = (-(-channels // _FINALIZE_BLOCK),), (channels, count, eps)
        kernel = kernels().channel_stats.finalize_stats_fwd_kernel
        launch(kernel, grid, (*inputs, stats), sizes, constants)

    def scale_shift_act(self, call: Normalisation) -> None:
        """One pass; without `stats` by a kernel of its own."""
        y, stats, residual, residual_stats, act, out, mask, in_place = call
        kernel, flags = kernels().add_act.add_act_fwd_kernel, output_flags(act, mask is not None)
        tensors: tuple[Tensor | None, ...] = (y, residual, out, mask)
        if stats is not None:
            kernel = kernels().scale_shift_act.scale_shift_act_fwd_kernel
            tensors = (y, stats, residual, residual_stats, out, mask)
            flags["HAS_RESIDUAL"] = residual is not None
            flags["HAS_RESIDUAL_STATS"] = residual_stats is not None
        flags["HAS_MASK"] = mask is not None
        launch_elementwise(kernel, Matrix.of(y), tensors, flags, in_place=in_place)

    def bn_act_backward_reduce(
        self, grad_out: Tensor, gate: Gate, branches: Sequence[Branch], sums: Tensor | None
    ) -> Tensor:
        """The sum of partial results, of which `sums` are the last."""
        kernel, m = kernels().bn_act.bn_act_reduce_bwd_kernel, Matrix.of(grad_out)
        inputs = (grad_out, gate.tensor, *branch_tensors(branches))
        flags = {**gate_flags(gate), "HAS_SECOND": len(branches) > 1}

        def run(tiling: object) -> Tensor:
            rows = partials_of(m, tiling) + (sums is not None)
            partials = floats(rows, 3, m.channels, device=grad_out.device)
            launch_tiled(kernel, m, tiling, (*inputs, partials), flags)
            if sums is not None:
                partials[-1].copy_(sums)
            return partials

        return sum_partials(run(choose_tiling(kernel, m, inputs, flags, run, SEVERAL)))

    def bn_act_backward_apply(self, call: Gradients) -> None:
        """One pass for both branches and the residual; without branches by a kernel of its own."""
        grad_out, gate, branches, sums, count, grads, residual, in_place = call
        m, flags = Matrix.of(grad_out), gate_flags(gate)
        if not branches:
            tensors = (grad_out, gate.tensor, residual)
            kernel = kernels().add_act.act_bwd_kernel
            launch_elementwise(kernel, m, tensors, flags, in_place=in_place)
            return
        inputs = (grad_out, gate.tensor, *branch_tensors(branches), sums)
        flags |= {
            "HAS_SUMS": sums is not None,
            "HAS_FIRST": grads[0] is not None,
            "HAS_SECOND": grads[1] is not None,
            "HAS_RESIDUAL": residual is not None,
        }
        launch_elementwise(
            kernels().bn_act.bn_act_apply_bwd_kernel, m, (*inputs, *grads, residual), flags,
            (1 / max(count, 1),), in_place=in_place, widest=SEVERAL,
        )  # fmt: skip


def merge_stats(partials: Tensor, counts: Tensor) -> Tensor:
    """(mean, M2) [2, C] out of partials [P, 3, C] and their counts [P], in a fixed order."""
    constants: dict[str, int] = kernels().channel_stats.MERGE
    channels, device = partials.shape[2], partials.device
    while True:
        groups = -(-len(partials) // constants["GROUP"])
        last = groups == 1
        merged = floats(groups, 2 if last else 3, channels, device=device)
        merged_counts = floats(groups, device=device)
        grid = (groups * -(-channels // constants["CHANNELS"]),)
        tensors, sizes = (partials, counts, merged, merged_counts), (len(partials), channels)
        kernel = kernels().channel_stats.merge_stats_kernel
        launch(kernel, grid, tensors, sizes, {"LAST": last, **constants})
        if last:
            return merged[0]
        partials, counts = merged, merged_counts


def sum_partials(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum over the first dimension of a dense tensor, in a fixed order."""
    width, device = partials[0].numel(), partials.device
    while True:
        constants = kernels().bn_act.sum_shape(len(partials))
        groups = -(-len(partials) // constants["GROUP"])
        last = groups == 1
        stored = dtype if last else torch.float32
        merged = torch.empty(groups, *partials.shape[1:], dtype=stored, device=device)
        grid = (groups * -(-width // constants["COLUMNS"]),)
        kernel, sizes = kernels().bn_act.sum_partials_kernel, (len(partials), width)
        launch(kernel, grid, (partials, merged), sizes, constants)
        if last:
            return merged[0]
        partials = merged


_primitives = Pointwise("triton", Launches(), why_not)
channel_stats, finalize_stats = _primitives.channel_stats, _primitives.finalize_stats
scale_shift_act = _primitives.scale_shift_act
bn_act_backward_reduce = _primitives.bn_act_backward_reduce
bn_act_backward_apply = _primitives.bn_act_backward_apply
act_backward = _primitives.act_backward
