"""Backward of batch norm and activation: the sums per channel, and the gradients they lead to."""

import triton
import triton.language as tl

from .activations import backward
from .arithmetic import (
    GATE_AFFINE,
    GATE_MASK,
    GATE_NONE,
    INVSTD,
    MEAN,
    SCALE,
    SHIFT,
    affine,
    bn_gradient,
    to_storage,
    total,
)
from .tiling import NUMBERS, channel_of, elements, load_values, start, unpack_bits


def sum_shape(partials: int) -> dict[str, int]:
    """How many partials one program adds up, how many at a time, and how many columns of them."""
    rows = min(128, triton.next_power_of_2(partials))
    return {"GROUP": 512 if partials > rows else rows, "ROWS": rows, "COLUMNS": 2048 // rows}


@triton.jit
def _gated(
    p_gate, b_g, b_y, b_scale, b_shift,
    o_element, m_element, o_byte, m_byte,
    dtype: tl.constexpr, GATE: tl.constexpr, DERIVATIVE: tl.constexpr,
):  # fmt: skip
    if GATE == GATE_NONE:
        return b_g
    elif GATE == GATE_AFFINE:
        return backward(b_g, affine(b_y, b_scale, b_shift), dtype, DERIVATIVE)
    elif GATE == GATE_MASK:
        return tl.where(unpack_bits(p_gate, o_byte, m_byte), b_g, 0.0)
    else:
        return tl.where(DERIVATIVE(load_values(p_gate, o_element, m_element)), b_g, 0.0)


@triton.jit(do_not_specialize=NUMBERS)
def bn_act_reduce_bwd_kernel(
    p_grad_out, p_gate, p_y1, p_stats1, p_y2, p_stats2, p_partials,
    rows, cols, row_bytes, channels, chunk, chunks, steps,
    GATE: tl.constexpr, DERIVATIVE: tl.constexpr, HAS_SECOND: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """Per chunk [3, C]: sum_g, and per branch sum(g*(y - mean))*invstd."""
    row, byte, index = start(rows, row_bytes, chunk, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES)
    o_row = row + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    o_col = byte * 8 + tl.arange(0, BLOCK_BYTES * 8).to(tl.int64)[None, :]
    channel, m_channel = channel_of(
        row, byte, rows, cols, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES
    )
    b_mean1 = load_values(p_stats1 + MEAN * channels, channel, m_channel)
    b_scale1 = load_values(p_stats1 + SCALE * channels, channel, m_channel)
    b_shift1 = load_values(p_stats1 + SHIFT * channels, channel, m_channel)
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_BYTES, 8], tl.float32)
    b_sum1 = tl.zeros([BLOCK_ROWS, BLOCK_BYTES, 8], tl.float32)
    if HAS_SECOND:
        b_mean2 = load_values(p_stats2 + MEAN * channels, channel, m_channel)
        b_sum2 = tl.zeros([BLOCK_ROWS, BLOCK_BYTES, 8], tl.float32)
    for _step in range(steps):
        o_element, m_element, o_byte, m_byte = elements(
            row, byte, rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES
        )
        b_g = load_values(p_grad_out, o_element, m_element)
        b_y = load_values(p_y1, o_element, m_element)
        b_g = _gated(
            p_gate, b_g, b_y, b_scale1, b_shift1, o_element, m_element, o_byte, m_byte,
            p_grad_out.dtype.element_ty, GATE, DERIVATIVE,
        )  # fmt: skip
        b_sum += b_g
        b_sum1 += tl.where(m_element, b_g * (b_y - b_mean1), 0.0)
        if HAS_SECOND:
            b_y2 = load_values(p_y2, o_element, m_element)
            b_sum2 += tl.where(m_element, b_g * (b_y2 - b_mean2), 0.0)
        if CHANNELS_LAST:
            row += BLOCK_ROWS
        else:
            byte += BLOCK_BYTES
    if CHANNELS_LAST:
        channel, m_channel, partial = o_col, o_col < cols, index
    else:
        channel, m_channel = o_row % channels, o_row < rows
        partial = (o_row // channels) * chunks + index
    p_partials += partial * 3 * channels + channel
    b_invstd = load_values(p_stats1 + INVSTD * channels, channel, m_channel)
    tl.store(p_partials, over_tile(b_sum, CHANNELS_LAST), mask=m_channel)
    tl.store(p_partials + channels, over_tile(b_sum1, CHANNELS_LAST) * b_invstd, mask=m_channel)
    if HAS_SECOND:
        b_invstd = load_values(p_stats2 + INVSTD * channels, channel, m_channel)
        b_sum2 = over_tile(b_sum2, CHANNELS_LAST)
        tl.store(p_partials + 2 * channels, b_sum2 * b_invstd, mask=m_channel)


@triton.jit
def over_tile(b_sum, CHANNELS_LAST: tl.constexpr):
    """Sum over a tile's rows [1, 8B] or columns [R, 1]."""
    b_sum = tl.reshape(b_sum, [b_sum.shape[0], b_sum.shape[1] * 8])
    return total(b_sum, 0 if CHANNELS_LAST else 1)


@triton.jit(do_not_specialize=NUMBERS)
def sum_partials_kernel(
    p_partials,
    p_merged,
    partials,
    width,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up `GROUP` consecutive rows of a [partials, width] matrix, in their order."""
    group = tl.program_id(0).to(tl.int64) // tl.cdiv(width, COLUMNS)
    block = tl.program_id(0).to(tl.int64) % tl.cdiv(width, COLUMNS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b_sum = tl.zeros([1, COLUMNS], tl.float32)
    for start_row in range(0, GROUP, ROWS):
        partial = group * GROUP + start_row + tl.arange(0, ROWS).to(tl.int64)[:, None]
        m = (partial < partials) & (column < width)
        b_rows = tl.load(p_partials + partial * width + column, mask=m, other=0.0)
        b_sum += total(b_rows, 0)
    o_merged = group * width + column
    tl.store(p_merged + o_merged, to_storage(b_sum, p_merged.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=NUMBERS)
def bn_act_apply_bwd_kernel(
    p_grad_out, p_gate, p_y1, p_stats1, p_y2, p_stats2, p_sums, p_grad1, p_grad2, p_grad_residual,
    rows, cols, row_bytes, channels, chunk, chunks, steps, inverse_count,
    GATE: tl.constexpr, DERIVATIVE: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_FIRST: tl.constexpr,
    HAS_SECOND: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """grad_y of each wanted branch, and the gated gradient itself, in one pass."""
    row, byte, _ = start(rows, row_bytes, chunk, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES)
    channel, m_channel = channel_of(
        row, byte, rows, cols, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES
    )
    b_shift1 = load_values(p_stats1 + SHIFT * channels, channel, m_channel)
    b_scale1, b_mean1, b_slope1, b_mean_g = load_bn(
        p_stats1, p_sums, 1, channel, m_channel, channels, inverse_count, HAS_SUMS
    )
    if HAS_SECOND:
        b_scale2, b_mean2, b_slope2, _ = load_bn(
            p_stats2, p_sums, 2, channel, m_channel, channels, inverse_count, HAS_SUMS
        )
    for _step in range(steps):
        o_element, m_element, o_byte, m_byte = elements(
            row, byte, rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES
        )
        b_g = load_values(p_grad_out, o_element, m_element)
        b_y = b_g
        if GATE == GATE_AFFINE or (HAS_FIRST and HAS_SUMS):
            b_y = load_values(p_y1, o_element, m_element)
        dtype: tl.constexpr = p_grad_out.dtype.element_ty
        b_g = _gated(
            p_gate, b_g, b_y, b_scale1, b_shift1, o_element, m_element, o_byte, m_byte, dtype,
            GATE, DERIVATIVE,
        )  # fmt: skip
        if HAS_FIRST:
            b_grad = b_g * b_scale1
            if HAS_SUMS:
                b_grad = bn_gradient(b_g, b_y, b_mean1, b_scale1, b_slope1, b_mean_g)
            tl.store(p_grad1 + o_element, to_storage(b_grad, dtype), mask=m_element)
        if HAS_SECOND:
            b_grad = b_g * b_scale2
            if HAS_SUMS:
                b_y = load_values(p_y2, o_element, m_element)
                b_grad = bn_gradient(b_g, b_y, b_mean2, b_scale2, b_slope2, b_mean_g)
            tl.store(p_grad2 + o_element, to_storage(b_grad, dtype), mask=m_element)
        if HAS_RESIDUAL:
            tl.store(p_grad_residual + o_element, to_storage(b_g, dtype), mask=m_element)
        if CHANNELS_LAST:
            row += BLOCK_ROWS
        else:
            byte += BLOCK_BYTES


@triton.jit
def load_bn(
    p_stats, p_sums,
    ROW: tl.constexpr,
    channel, m_channel, channels, inverse_count,
    HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """(scale, mean, slope, mean of g) of channels; `ROW` is the branch's row of the sums."""
    b_scale = load_values(p_stats + SCALE * channels, channel, m_channel)
    b_mean, b_slope, b_mean_g = b_scale, b_scale, b_scale
    if HAS_SUMS:
        b_mean = load_values(p_stats + MEAN * channels, channel, m_channel)
        b_invstd = load_values(p_stats + INVSTD * channels, channel, m_channel)
        b_sum_gx = load_values(p_sums + ROW * channels, channel, m_channel)
        b_slope = -b_scale * b_invstd * (b_sum_gx * inverse_count)
        b_mean_g = load_values(p_sums, channel, m_channel) * inverse_count
    return b_scale, b_mean, b_slope, b_mean_g
