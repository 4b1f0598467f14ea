"""silu(scale*y + shift) in one pass, and the backward of batch norm with SiLU in two.

SiLU (Hendrycks and Gimpel 2016; Elfwing et al. 2018): silu(v) = v*s with s = sigmoid(v), and so
silu'(v) = s*(1 + v*(1 - s)). The derivative is not 0 or 1, so backward forms v again from y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from fastres.triton_kernels.arithmetic import (
    INVSTD,
    MEAN,
    SCALE,
    SHIFT,
    affine,
    bn_gradient,
    to_storage,
    total,
)
from fastres.triton_kernels.bn_act import load_bn
from fastres.triton_kernels.walk import channel_of, elements, load_values, start
from torch import Tensor
from torch.nn import functional as F

from fastres.kernels import Branch, Gate, Request, register, register_activation
from fastres.kernels.triton.support import Matrix
from fastres.kernels.triton.support import why_not as why_not_triton
from fastres.kernels.triton.walk import (
    SEVERAL,
    choose_tiling,
    launch_walk,
    partials_of,
    sum_partials,
    walk,
)

# ---------------------------------------------------------------- the definition


def silu_derivative(v: Tensor) -> Tensor:
    """s*(1 + v*(1 - s)) with s = sigmoid(v)."""
    s = torch.sigmoid(v)
    return s * (1 + v * (1 - s))


# |silu'| ends at 1.0998 and |silu''| at 0.5.
register_activation("silu", F.silu, silu_derivative, slope=1.1, curvature=0.5)


# ---------------------------------------------------------------- the kernels


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def silu_gradient(g, v):
    s = 1.0 / (1.0 + tl.exp(-v))
    return g * (s * (1.0 + v * (1.0 - s)))


@triton.jit
def scale_shift_silu_fwd_kernel(
    p_y,
    p_stats,
    p_out,
    rows,
    cols,
    row_bytes,
    channels,
    chunk,
    chunks,
    steps,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    row, byte, _ = start(rows, row_bytes, chunk, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES)
    channel, m_channel = channel_of(
        row, byte, rows, cols, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES
    )
    b_scale = load_values(p_stats + SCALE * channels, channel, m_channel)
    b_shift = load_values(p_stats + SHIFT * channels, channel, m_channel)
    for _step in range(steps):
        o_element, m_element, _o_byte, _m_byte = elements(
            row, byte, rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES
        )
        b_v = affine(load_values(p_y, o_element, m_element), b_scale, b_shift)
        b_out = to_storage(silu(b_v), p_out.dtype.element_ty)
        tl.store(p_out + o_element, b_out, mask=m_element)
        if CHANNELS_LAST:
            row += BLOCK_ROWS
        else:
            byte += BLOCK_BYTES


@triton.jit
def bn_silu_reduce_bwd_kernel(
    p_grad_out,
    p_y,
    p_stats,
    p_partials,
    rows,
    cols,
    row_bytes,
    channels,
    chunk,
    chunks,
    steps,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Per chunk, of [3, C] the first two rows: sum_g, and sum(g*(y - mean))*invstd."""
    row, byte, index = start(rows, row_bytes, chunk, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES)
    o_row = row + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    o_col = byte * 8 + tl.arange(0, BLOCK_BYTES * 8).to(tl.int64)[None, :]
    channel, m_channel = channel_of(
        row, byte, rows, cols, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES
    )
    b_mean = load_values(p_stats + MEAN * channels, channel, m_channel)
    b_scale = load_values(p_stats + SCALE * channels, channel, m_channel)
    b_shift = load_values(p_stats + SHIFT * channels, channel, m_channel)
    b_sum_g = tl.zeros([BLOCK_ROWS, BLOCK_BYTES, 8], tl.float32)
    b_sum_gx = tl.zeros([BLOCK_ROWS, BLOCK_BYTES, 8], tl.float32)
    for _step in range(steps):
        o_element, m_element, _o_byte, _m_byte = elements(
            row, byte, rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES
        )
        b_y = load_values(p_y, o_element, m_element)
        b_g = silu_gradient(
            load_values(p_grad_out, o_element, m_element), affine(b_y, b_scale, b_shift)
        )
        # What is no element must not bring a NaN into its channel.
        b_g = tl.where(m_element, b_g, 0.0)
        b_sum_g += b_g
        b_sum_gx += tl.where(m_element, b_g * (b_y - b_mean), 0.0)
        if CHANNELS_LAST:
            row += BLOCK_ROWS
        else:
            byte += BLOCK_BYTES
    if CHANNELS_LAST:
        channel, m_channel, partial = o_col, o_col < cols, index
    else:
        channel, m_channel = o_row % channels, o_row < rows
        partial = (o_row // channels) * chunks + index
    b_sum_g = tl.reshape(b_sum_g, [BLOCK_ROWS, BLOCK_BYTES * 8])
    b_sum_g = total(b_sum_g, 0 if CHANNELS_LAST else 1)
    b_sum_gx = tl.reshape(b_sum_gx, [BLOCK_ROWS, BLOCK_BYTES * 8])
    b_sum_gx = total(b_sum_gx, 0 if CHANNELS_LAST else 1)
    b_invstd = load_values(p_stats + INVSTD * channels, channel, m_channel)
    p_partials += partial * 3 * channels + channel
    tl.store(p_partials, b_sum_g, mask=m_channel)
    tl.store(p_partials + channels, b_sum_gx * b_invstd, mask=m_channel)


@triton.jit
def bn_silu_apply_bwd_kernel(
    p_grad_out,
    p_y,
    p_stats,
    p_sums,
    p_grad_y,
    rows,
    cols,
    row_bytes,
    channels,
    chunk,
    chunks,
    steps,
    inverse_count,
    HAS_SUMS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    row, byte, _ = start(rows, row_bytes, chunk, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES)
    channel, m_channel = channel_of(
        row, byte, rows, cols, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES
    )
    b_shift = load_values(p_stats + SHIFT * channels, channel, m_channel)
    b_scale, b_mean, b_slope, b_mean_g = load_bn(
        p_stats, p_sums, 1, channel, m_channel, channels, inverse_count, HAS_SUMS
    )
    for _step in range(steps):
        o_element, m_element, _o_byte, _m_byte = elements(
            row, byte, rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES
        )
        b_y = load_values(p_y, o_element, m_element)
        b_g = silu_gradient(
            load_values(p_grad_out, o_element, m_element), affine(b_y, b_scale, b_shift)
        )
        b_grad_y = b_g * b_scale
        if HAS_SUMS:
            b_grad_y = bn_gradient(b_g, b_y, b_mean, b_scale, b_slope, b_mean_g)
        b_grad_y = to_storage(b_grad_y, p_grad_y.dtype.element_ty)
        tl.store(p_grad_y + o_element, b_grad_y, mask=m_element)
        if CHANNELS_LAST:
            row += BLOCK_ROWS
        else:
            byte += BLOCK_BYTES


# ---------------------------------------------------------------- the adapters


def why_not(request: Request) -> str | None:
    """Why these kernels decline a request, or None."""
    if request.act != "silu":
        return f"its activation is silu, got {request.act}"
    # Machine, device and dtype are what fastres' own Triton kernels ask for.
    return why_not_triton(replace(request, act="none"))


@register("scale_shift_act", "triton", why_not=why_not, name="silu")
def scale_shift_silu(
    y: Tensor,
    stats: Tensor,
    *,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    act: str = "silu",
    want_mask: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, None]:
    """silu(scale*y + shift); `out` may be y."""
    if residual is not None or want_mask:
        raise NotImplementedError("SiLU keeps no mask, so it never follows a residual")
    in_place = out is not None
    out = torch.empty_like(y) if out is None else out
    walk(
        __name__, "scale_shift_silu_fwd_kernel", Matrix.of(y), (y, stats, out), {},
        in_place=in_place,
    )  # fmt: skip
    return out, None


def only_branch(gate: Gate, branches: Sequence[Branch]) -> Branch:
    """The one branch whose y and stats the derivative is formed from."""
    if gate.kind != "affine" or len(branches) != 1:
        raise NotImplementedError(
            f"gate must be affine with one branch, got {gate.kind} with {len(branches)}"
        )
    return branches[0]


@register("bn_act_backward_reduce", "triton", why_not=why_not, name="silu")
def bn_silu_backward_reduce(
    grad_out: Tensor, gate: Gate, branches: Sequence[Branch], *, sums: Tensor | None = None
) -> Tensor:
    """`sums` float32 [3, C], the last row nobody's; added to `sums` where it is given."""
    m = Matrix.of(grad_out)
    if m.rows == 0 or m.cols == 0:
        return torch.zeros(3, m.channels, device=grad_out.device) if sums is None else sums.clone()
    given = (grad_out, *only_branch(gate, branches))
    kernel = "bn_silu_reduce_bwd_kernel"

    def run(tiling: object) -> Tensor:
        count = partials_of(m, tiling)
        partials = torch.empty(count + (sums is not None), 3, m.channels, device=grad_out.device)
        launch_walk(__name__, kernel, m, tiling, (*given, partials), {})
        if sums is not None:
            partials[-1].copy_(sums)
        return partials

    tiling = choose_tiling(__name__, kernel, m, given, {}, run, SEVERAL)
    return sum_partials(run(tiling))


@register("bn_act_backward_apply", "triton", why_not=why_not, name="silu")
def bn_silu_backward_apply(
    grad_out: Tensor,
    gate: Gate,
    branches: Sequence[Branch],
    sums: Tensor,
    count: int,
    *,
    want_grads: Sequence[bool],
    want_residual: bool = False,
    out: Tensor | None = None,
) -> tuple[list[Tensor | None], None]:
    """grad_y; `out` may be grad_out."""
    if want_residual:
        raise NotImplementedError("SiLU never follows a residual")
    y, stats = only_branch(gate, branches)
    if not want_grads[0]:
        return [None], None
    grad_y = torch.empty_like(grad_out) if out is None else out
    walk(
        __name__, "bn_silu_apply_bwd_kernel", Matrix.of(grad_out),
        (grad_out, y, stats, sums if count else None, grad_y), {"HAS_SUMS": count > 0},
        (1 / max(count, 1),), in_place=out is not None,
    )  # fmt: skip
    return [grad_y], None
