"""act(scale*y + shift [+ residual, plain or with a scale and shift of its own]), one pass."""

import triton
import triton.language as tl

from .arithmetic import SCALE, SHIFT, affine, to_storage
from .tiling import NUMBERS, channel_of, elements, load_values, start, store_bits


@triton.jit(do_not_specialize=NUMBERS)
def scale_shift_act_fwd_kernel(
    p_y, p_stats, p_residual, p_residual_stats, p_out, p_mask,
    rows, cols, row_bytes, channels, chunk, chunks, steps,
    ACT: tl.constexpr, DERIVATIVE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_RESIDUAL_STATS: tl.constexpr, HAS_MASK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    row, byte, _ = start(rows, row_bytes, chunk, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES)
    channel, m_channel = channel_of(
        row, byte, rows, cols, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES
    )
    b_scale = load_values(p_stats + SCALE * channels, channel, m_channel)
    b_shift = load_values(p_stats + SHIFT * channels, channel, m_channel)
    if HAS_RESIDUAL_STATS:
        b_residual_scale = load_values(p_residual_stats + SCALE * channels, channel, m_channel)
        b_residual_shift = load_values(p_residual_stats + SHIFT * channels, channel, m_channel)
    for _step in range(steps):
        o_element, m_element, o_byte, m_byte = elements(
            row, byte, rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES
        )
        b_value = affine(load_values(p_y, o_element, m_element), b_scale, b_shift)
        if HAS_RESIDUAL:
            b_residual = load_values(p_residual, o_element, m_element)
            if HAS_RESIDUAL_STATS:
                b_residual = affine(b_residual, b_residual_scale, b_residual_shift)
            b_value += b_residual
        b_out = to_storage(ACT(b_value), p_out.dtype.element_ty)
        tl.store(p_out + o_element, b_out, mask=m_element)
        if HAS_MASK:
            b_open = DERIVATIVE(b_out.to(tl.float32))
            store_bits(p_mask, o_byte, m_byte, m_element & b_open)
        if CHANNELS_LAST:
            row += BLOCK_ROWS
        else:
            byte += BLOCK_BYTES
