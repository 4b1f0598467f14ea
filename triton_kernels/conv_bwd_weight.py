"""Gradient of a convolution's weight, with prologues on both operands.

The sum over pixels is split; each split leaves its part in float32, and the parts are added in
order by a second kernel: the same bits every time, where atomics would give other ones.
"""

import triton
import triton.language as tl

from .arithmetic import dot
from .conv import (
    NUMBERS,
    block_of,
    inside,
    load_gradient,
    normalised,
    offsets,
    pixels_of,
    split_pixel,
)


@triton.jit(do_not_specialize=NUMBERS)
def conv_bwd_weight_kernel(
    p_grad, p_gate, p_y, p_stats, p_sums, p_x, p_x_stats, p_parts,
    images, height, width, out_height, out_width, in_channels, out_channels, inverse_count, steps,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr, PENDING: tl.constexpr, GATE: tl.constexpr, DERIVATIVE: tl.constexpr,
    HAS_SUMS: tl.constexpr, HAS_PROLOGUE: tl.constexpr, ACT_X: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [splits, K, taps, C/groups]: grad_y^T [K, pixels] @ P(x) [pixels, C] of each tap.

    A split takes `steps` times BLOCK_K pixels.
    """
    group_in, group_out = in_channels // GROUPS, out_channels // GROUPS
    k_blocks, c_blocks = tl.cdiv(group_out, BLOCK_M), tl.cdiv(group_in, BLOCK_N)
    taps: tl.constexpr = TAPS_H * TAPS_W
    padded: tl.constexpr = PAD_H > 0 or PAD_W > 0
    flat: tl.constexpr = taps * STRIDE_H * STRIDE_W == 1 and not padded
    c_block, rest = tl.program_id(0) % c_blocks, tl.program_id(0) // c_blocks
    tap, rest = rest % taps, rest // taps
    k_block, rest = rest % k_blocks, rest // k_blocks
    group, split = rest % GROUPS, rest // GROUPS
    k = k_block * BLOCK_M + tl.arange(0, BLOCK_M)
    c = c_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k, m_c = k < group_out, c < group_in
    o_k, o_c = group * group_out + k, group * group_in + c
    tap_h, tap_w = (tap // TAPS_W) * DILATION_H - PAD_H, (tap % TAPS_W) * DILATION_W - PAD_W
    pixels = pixels_of(images, out_height, out_width, WIDE)
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        first = block_of(split * steps + step, BLOCK_K, WIDE)
        m_pixel = first + lane < pixels
        b_grad = load_gradient(
            p_grad, p_gate, p_y, p_stats, p_sums, lane, first,
            group * group_out + k_block * BLOCK_M, m_pixel, m_k, out_channels, inverse_count,
            BLOCK_M, PENDING, GATE, DERIVATIVE, HAS_SUMS, GROUPS == 1,
        )  # fmt: skip
        m_x, moved = m_pixel, group * group_in + c_block * BLOCK_N
        if flat:
            o_x = offsets(lane, BLOCK_N, in_channels)
            moved += first.to(tl.int64) * in_channels
        else:
            image, row, col = split_pixel(first + lane, out_height, out_width)
            row, col = row * STRIDE_H + tap_h, col * STRIDE_W + tap_w
            m_x &= inside(row, height) & inside(col, width)
            o_x = offsets((image * height + row) * width + col, BLOCK_N, in_channels)
        b_x = tl.load(p_x + moved + o_x, mask=m_x[:, None] & m_c[None, :], other=0.0)
        if HAS_PROLOGUE:
            b_x = normalised(b_x, p_x_stats, o_c, m_c, in_channels, m_x, ACT_X, padded)
        acc = dot(tl.trans(b_grad), b_x, acc, PRECISION)
    o_parts = ((split.to(tl.int64) * out_channels + o_k)[:, None] * taps + tap) * group_in + c[
        None, :
    ]
    tl.store(p_parts + o_parts, acc, mask=m_k[:, None] & m_c[None, :])
