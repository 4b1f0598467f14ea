"""Convolution, NHWC, with a prologue on its input and what follows in its epilogue."""

import triton
import triton.language as tl

from .arithmetic import SCALE, SHIFT, affine, dot, to_storage
from .channel_stats import spread, store_partial
from .conv import NUMBERS, block_of, inside, normalised, offsets, pixels_of, split_pixel, within
from .tiling import load_values


@triton.jit(do_not_specialize=NUMBERS)
def conv_fwd_kernel(
    p_x, p_x_stats, p_weight, p_bias, p_stats, p_residual, p_y, p_partials, p_counts,
    images, height, width, out_height, out_width, in_channels, out_channels,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr, HAS_PROLOGUE: tl.constexpr, ACT_X: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_AFFINE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    HAS_STATE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, TAIL_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [pixels, K] = P(x) [pixels, taps*C] @ weight [taps*C, K], then bias, affine, residual, act.

    HAS_STATE leaves the statistics of the stored tile in p_partials [tiles, 3, K], its pixels in
    p_counts.
    """
    group_in, group_out = in_channels // GROUPS, out_channels // GROUPS
    blocks = tl.cdiv(group_out, BLOCK_N)
    tile, column = tl.program_id(0) // (blocks * GROUPS), tl.program_id(0) % (blocks * GROUPS)
    group = column // blocks
    pixel = block_of(tile, BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
    k = (column % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_pixel, m_k = pixel < pixels_of(images, out_height, out_width, WIDE), k < group_out
    k += group * group_out
    taps: tl.constexpr = TAPS_H * TAPS_W
    padded: tl.constexpr = PAD_H > 0 or PAD_W > 0
    origin = pixel
    if taps > 1 or STRIDE_H > 1 or STRIDE_W > 1 or padded:
        image, row, col = split_pixel(pixel, out_height, out_width)
        row, col = row * STRIDE_H - PAD_H, col * STRIDE_W - PAD_W
        origin = (image * height + row) * width + col
    o_x, o_weight = offsets(origin, BLOCK_K, in_channels), offsets(k, BLOCK_K, taps * group_in)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tap, first = 0, 0
    for _ in range(taps * tl.cdiv(group_in, BLOCK_K)):
        m_c = within(first, BLOCK_K, group_in, TAIL_K)
        tap_h, tap_w = (tap // TAPS_W) * DILATION_H, (tap % TAPS_W) * DILATION_W
        m_x = m_pixel
        if padded:
            m_x &= inside(row + tap_h, height) & inside(col + tap_w, width)
        moved = (tap_h * width + tap_w).to(tl.int64) * in_channels + group * group_in + first
        b_x = tl.load(p_x + moved + o_x, mask=m_x[:, None] & m_c[None, :], other=0.0)
        if HAS_PROLOGUE:
            o_c = group * group_in + first + tl.arange(0, BLOCK_K)
            b_x = normalised(b_x, p_x_stats, o_c, m_c, in_channels, m_x, ACT_X, padded)
        m_weight = m_k[:, None] & m_c[None, :]
        b_weight = tl.load(p_weight + tap * group_in + first + o_weight, mask=m_weight, other=0.0)
        acc = dot(b_x, tl.trans(b_weight), acc, PRECISION)
        first += BLOCK_K
        if taps > 1:
            tap, first = tap + (first >= group_in), tl.where(first >= group_in, 0, first)
    if HAS_BIAS:
        acc += load_values(p_bias, k, m_k)[None, :]
    o_y = pixel.to(tl.int64)[:, None] * out_channels + k[None, :]
    m_y = m_pixel[:, None] & m_k[None, :]
    if HAS_AFFINE:
        b_scale = load_values(p_stats + SCALE * out_channels, k, m_k)
        b_shift = load_values(p_stats + SHIFT * out_channels, k, m_k)
        acc = affine(acc, b_scale[None, :], b_shift[None, :])
        if HAS_RESIDUAL:
            acc += load_values(p_residual, o_y, m_y)
        acc = ACT(acc)
    b_y = to_storage(acc, p_y.dtype.element_ty)
    tl.store(p_y + o_y, b_y, mask=m_y)
    if HAS_STATE:
        count = tl.sum(m_pixel.to(tl.float32), axis=0)
        b_base, b_mean, b_m2 = spread(b_y.to(tl.float32), m_pixel[:, None], count)
        o_partial = (tile.to(tl.int64) * 3 * out_channels + k)[None, :]
        store_partial(p_partials, o_partial, b_base, b_mean, b_m2, out_channels, m_k[None, :])
        tl.store(p_counts + tile, count, mask=column == 0)
