"""1x1 convolution as a persistent matrix product over tensor descriptors (Hopper's TMA and newer).

What `conv_fwd` computes for a kernel of 1x1, stride 1: tiles arrive and leave by the copy engine,
which needs no offsets in registers, and a program goes on to the next tile while the last one is
stored.
"""

import triton
import triton.language as tl

from .arithmetic import dot, to_storage
from .channel_stats import spread, store_partial
from .conv import NUMBERS, normalised


@triton.jit(do_not_specialize=NUMBERS)
def conv1x1_fwd_kernel(
    d_x, p_x_stats, d_weight, d_y, p_partials, p_counts,
    pixels, in_channels, out_channels,
    HAS_PROLOGUE: tl.constexpr, ACT_X: tl.constexpr, HAS_STATE: tl.constexpr,
    PRECISION: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [pixels, K] = P(x) [pixels, C] @ weight^T [C, K], and the statistics of each tile."""
    blocks = tl.cdiv(out_channels, BLOCK_N)
    tiles = tl.cdiv(pixels, BLOCK_M) * blocks
    for index in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE
    ):
        tile, column = index // blocks, index % blocks
        pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        k = column * BLOCK_N + tl.arange(0, BLOCK_N)
        m_pixel, m_k = pixel < pixels, k < out_channels
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(tl.cdiv(in_channels, BLOCK_K)):
            # What lies outside reads as zero.
            b_x = d_x.load([tile * BLOCK_M, step * BLOCK_K])
            b_weight = d_weight.load([column * BLOCK_N, step * BLOCK_K])
            if HAS_PROLOGUE:
                c = step * BLOCK_K + tl.arange(0, BLOCK_K)
                m_c = c < in_channels
                b_x = normalised(b_x, p_x_stats, c, m_c, in_channels, m_pixel, ACT_X, False)
            acc = dot(b_x, tl.trans(b_weight), acc, PRECISION)
        b_y = to_storage(acc, d_y.dtype)
        d_y.store([tile * BLOCK_M, column * BLOCK_N], b_y)
        if HAS_STATE:
            count = tl.sum(m_pixel.to(tl.float32), axis=0)
            b_base, b_mean, b_m2 = spread(b_y.to(tl.float32), m_pixel[:, None], count)
            o_partial = (tile.to(tl.int64) * 3 * out_channels + k)[None, :]
            store_partial(p_partials, o_partial, b_base, b_mean, b_m2, out_channels, m_k[None, :])
            tl.store(p_counts + tile, count, mask=column == 0)
