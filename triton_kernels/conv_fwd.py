"""Convolution, NHWC, with a prologue on its input and what follows in its epilogue."""

import triton
import triton.language as tl

from .arithmetic import SCALE, SHIFT, affine, dot, relu, to_storage
from .channel_stats import spread, store_partial
from .conv import normalised, pixels_of, split_pixel
from .walk import load_values


@triton.jit
def conv_fwd_kernel(
    p_x,
    p_x_stats,
    p_weight,
    p_bias,
    p_stats,
    p_residual,
    p_y,
    p_partials,
    p_counts,
    images,
    height,
    width,
    out_height,
    out_width,
    in_channels,
    out_channels,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_PROLOGUE: tl.constexpr,
    RELU_X: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y [pixels, K] = P(x) [pixels, taps*C] @ weight [taps*C, K], then bias, affine, residual, act.

    HAS_STATE leaves the statistics of the stored tile in p_partials [tiles, 3, K], its pixels in
    p_counts.
    """
    group_in, group_out = in_channels // GROUPS, out_channels // GROUPS
    blocks = tl.cdiv(group_out, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    tile, column = pid // (blocks * GROUPS), pid % (blocks * GROUPS)
    group = column // blocks
    pixels = pixels_of(images, out_height, out_width)
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    k = (column % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_pixel, m_k = pixel < pixels, k < group_out
    k += group * group_out
    image, row, col = split_pixel(pixel, out_height, out_width)
    row, col = row * STRIDE_H - PAD_H, col * STRIDE_W - PAD_W
    origin = (image * height + row) * width + col
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = tl.cdiv(group_in, BLOCK_K)
    for step in range(TAPS_H * TAPS_W * steps):
        tap = step // steps
        tap_h, tap_w = (tap // TAPS_W) * DILATION_H, (tap % TAPS_W) * DILATION_W
        c = (step % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_c = c < group_in
        m_x = m_pixel
        if PAD_H > 0 or PAD_W > 0:
            m_x &= (row + tap_h >= 0) & (row + tap_h < height)
            m_x &= (col + tap_w >= 0) & (col + tap_w < width)
        m_x = m_x[:, None] & m_c[None, :]
        o_pixel = origin + tap_h * width + tap_w
        o_c = group * group_in + c
        b_x = tl.load(p_x + o_pixel[:, None] * in_channels + o_c[None, :], mask=m_x, other=0.0)
        if HAS_PROLOGUE:
            b_x = normalised(b_x, p_x_stats, o_c, m_c, in_channels, m_x, RELU_X)
        o_weight = (k[None, :] * (TAPS_H * TAPS_W) + tap) * group_in + c[:, None]
        b_weight = tl.load(p_weight + o_weight, mask=m_c[:, None] & m_k[None, :], other=0.0)
        acc = dot(b_x, b_weight, acc, PRECISION)
    if HAS_BIAS:
        acc += load_values(p_bias, k, m_k)[None, :]
    o_y = pixel[:, None] * out_channels + k[None, :]
    m_y = m_pixel[:, None] & m_k[None, :]
    if HAS_AFFINE:
        b_scale = load_values(p_stats + SCALE * out_channels, k, m_k)
        b_shift = load_values(p_stats + SHIFT * out_channels, k, m_k)
        acc = affine(acc, b_scale[None, :], b_shift[None, :])
        if HAS_RESIDUAL:
            acc += load_values(p_residual, o_y, m_y)
        if RELU:
            acc = relu(acc)
    b_y = to_storage(acc, p_y.dtype.element_ty)
    tl.store(p_y + o_y, b_y, mask=m_y)
    if HAS_STATE:
        count = tl.sum(m_pixel.to(tl.float32), axis=0)
        b_base, b_mean, b_m2 = spread(b_y.to(tl.float32), m_y, count)
        o_partial = (tile * 3 * out_channels + k)[None, :]
        store_partial(p_partials, o_partial, b_base, b_mean, b_m2, out_channels, m_k[None, :])
        tl.store(p_counts + tile, count, mask=column == 0)
