"""The primitives around the convolutions: statistics, normalisation, and their backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.kernels.common import (
    branch_tensors,
    floats,
    new_grads,
    new_mask,
    zeros,
)
from fastres.kernels.registry import register
from fastres.kernels.triton.activation import gate_flags, output_flags
from fastres.kernels.triton.launch import kernel_of, launch
from fastres.kernels.triton.support import Matrix, why_not
from fastres.kernels.triton.walk import (
    SEVERAL,
    choose_tiling,
    launch_walk,
    merge_stats,
    partials_of,
    sum_partials,
    walk,
)
from fastres.kernels.types import Branch, Gate

#: Channels of one program of the finalising kernel.
_FINALIZE_BLOCK = 128


@register("channel_stats", "triton", why_not=why_not)
def channel_stats(y: Tensor, state: Tensor | None = None, prior_count: int = 0) -> Tensor:
    """(mean, M2) per channel, float32 [2, C]; merged with `state` where it is given."""
    m = Matrix.of(y)
    if m.rows == 0 or m.cols == 0:
        return zeros(2, m.channels, device=y.device) if state is None else state.clone()

    def run(tiling: object) -> tuple[Tensor, Tensor]:
        extra = state is not None and prior_count > 0
        count = partials_of(m, tiling)
        partials = floats(count + extra, 3, m.channels, device=y.device)
        counts = floats(count + extra, device=y.device)
        launch_walk("channel_stats", kernel, m, tiling, (y, partials, counts), {})
        if state is not None and extra:
            partials[-1, ::2].copy_(state)
            partials[-1, 1].zero_()
            counts[-1:].fill_(prior_count)
        return partials, counts

    kernel = "channel_stats_fwd_kernel"
    tiling = choose_tiling("channel_stats", kernel, m, (y,), {}, run, SEVERAL)
    return merge_stats(*run(tiling))


@register("finalize_stats", "triton", why_not=why_not)
def finalize_stats(
    state: Tensor | None,
    count: int,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    acc: torch.dtype,
) -> Tensor:
    """`stats` float32 [5, C], computed in float64."""
    mean, var = running or (None, None)
    # The kernel reads them with a stride of 1; views of a parameter may have another.
    given = [None if t is None else t.contiguous() for t in (state, mean, var, weight, bias)]
    some = next(t for t in given if t is not None)
    channels = some.shape[-1]
    stats = floats(5, channels, device=some.device)
    constants = {
        "HAS_STATE": state is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "BLOCK": _FINALIZE_BLOCK,
    }
    grid = (-(-channels // _FINALIZE_BLOCK),)
    kernel = kernel_of("channel_stats", "finalize_stats_fwd_kernel")
    launch(kernel, grid, (*given, stats), (channels, count, eps), constants)
    return stats


@register("scale_shift_act", "triton", why_not=why_not)
def scale_shift_act(
    y: Tensor,
    stats: Tensor,
    *,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    act: str = "none",
    want_mask: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """act(scale*y + shift [+ residual, plain or scaled]); `out` may be y."""
    in_place = out is not None
    out = torch.empty_like(y) if out is None else out
    mask = new_mask(y) if want_mask else None
    flags = {
        **output_flags(act, want_mask),
        "HAS_RESIDUAL": residual is not None,
        "HAS_RESIDUAL_STATS": residual_stats is not None,
        "HAS_MASK": want_mask,
    }
    tensors = (y, stats, residual, residual_stats, out, mask)
    walk(
        "scale_shift_act", "scale_shift_act_fwd_kernel", Matrix.of(y), tensors, flags,
        in_place=in_place,
    )  # fmt: skip
    return out, mask


@register("bn_act_backward_reduce", "triton", why_not=why_not)
def bn_act_backward_reduce(
    grad_out: Tensor, gate: Gate, branches: Sequence[Branch], *, sums: Tensor | None = None
) -> Tensor:
    """`sums` float32 [3, C]; added to `sums` where it is given."""
    m = Matrix.of(grad_out)
    if m.rows == 0 or m.cols == 0:
        return zeros(3, m.channels, device=grad_out.device) if sums is None else sums.clone()
    given = (grad_out, gate.tensor, *branch_tensors(branches))
    flags = {**gate_flags(gate), "HAS_SECOND": len(branches) > 1}
    kernel = "bn_act_reduce_bwd_kernel"

    def run(tiling: object) -> Tensor:
        extra = sums is not None
        count = partials_of(m, tiling)
        partials = floats(count + extra, 3, m.channels, device=grad_out.device)
        launch_walk("bn_act", kernel, m, tiling, (*given, partials), flags)
        if sums is not None:
            partials[-1].copy_(sums)
        return partials

    tiling = choose_tiling("bn_act", kernel, m, given, flags, run, SEVERAL)
    return sum_partials(run(tiling))


@register("bn_act_backward_apply", "triton", why_not=why_not)
def bn_act_backward_apply(
    grad_out: Tensor,
    gate: Gate,
    branches: Sequence[Branch],
    sums: Tensor,
    count: int,
    *,
    want_grads: Sequence[bool],
    want_residual: bool = False,
    out: Tensor | None = None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """grad_y per branch, and the gated gradient itself on demand, in one pass."""
    grads = new_grads(grad_out, want_grads, out)
    residual = torch.empty_like(grad_out) if want_residual else None
    second = grads[1] if len(grads) > 1 else None
    flags = {
        **gate_flags(gate),
        "HAS_SUMS": count > 0,
        "HAS_FIRST": grads[0] is not None,
        "HAS_SECOND": second is not None,
        "HAS_RESIDUAL": want_residual,
    }
    tensors = (
        grad_out, gate.tensor, *branch_tensors(branches), sums if count else None,
        grads[0], second, residual,
    )  # fmt: skip
    walk(
        "bn_act", "bn_act_apply_bwd_kernel", Matrix.of(grad_out), tensors, flags,
        (1 / max(count, 1),), in_place=out is not None, widest=SEVERAL,
    )  # fmt: skip
    return grads, residual
