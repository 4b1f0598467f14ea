"""Gradient of a convolution's input, with grad_y formed on the way in and more on the way out.

With a stride, an input pixel meets only every STRIDE-th tap; pixels fall into STRIDE_H*STRIDE_W
classes, each a dense problem with its own taps, so that no product with a zero is computed.
"""

import triton
import triton.language as tl

from .activations import backward
from .arithmetic import (
    GATE_AFFINE,
    INVSTD,
    MEAN,
    SCALE,
    SHIFT,
    affine,
    dot,
    to_storage,
    total,
)
from .conv import (
    NUMBERS,
    block_of,
    inside,
    load_gradient,
    offsets,
    open_bits,
    pixels_of,
    split_pixel,
    within,
)
from .tiling import load_values


@triton.jit
def _taps_of(class_index, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr):
    """First tap of a class along one axis, and how many there are.

    Input position i meets tap t where (i + PAD - t) is a multiple of STRIDE; the class is
    i mod STRIDE.
    """
    tap = (class_index + PAD) % STRIDE
    return tap, (TAPS - tap + STRIDE - 1) // STRIDE


@triton.jit
def _add_residual(
    acc,
    p_residual, p_residual_gate,
    pixel, first, m_pixel, o_x, m_x, in_channels,
    RESIDUAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """acc + the residual's gradient: 1 as it lies, 2 gated by a mask's bits."""
    if RESIDUAL > 0:
        b_residual = load_values(p_residual, o_x, m_x)
        if RESIDUAL == 2:
            lanes: tl.constexpr = acc.shape[1]
            b_open = open_bits(p_residual_gate, pixel, first, m_pixel, in_channels, lanes, WHOLE)
            b_residual = tl.where(b_open, b_residual, 0.0)
        acc += b_residual
    return acc


@triton.jit
def _store_sums(
    p_partials, p_below, p_below_stats, b_g,
    tile, c, m_c, o_x, m_x, in_channels,
    BELOW_GATE: tl.constexpr, BELOW_DERIVATIVE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """sum_g and sum_gx of the batch norm below, for this tile of its gradient."""
    b_y = load_values(p_below, o_x, m_x)
    b_mean = load_values(p_below_stats + MEAN * in_channels, c, m_c)
    b_invstd = load_values(p_below_stats + INVSTD * in_channels, c, m_c)
    if BELOW_GATE == GATE_AFFINE:
        b_scale = load_values(p_below_stats + SCALE * in_channels, c, m_c)
        b_shift = load_values(p_below_stats + SHIFT * in_channels, c, m_c)
        b_v = affine(b_y, b_scale[None, :], b_shift[None, :])
        b_g = backward(b_g, b_v, dtype, BELOW_DERIVATIVE)
    # Outside, b_g is zero and b_y reads as zero. A mask says the same, but Triton 3.6 computes it
    # anew in the sums' layout, from the pixels' indices, and spills.
    b_gx = b_g * (b_y - b_mean[None, :])
    p_partials += (tile.to(tl.int64) * 3 * in_channels + c)[None, :]
    m_c = m_c[None, :]
    tl.store(p_partials, total(b_g, 0), mask=m_c)
    tl.store(p_partials + in_channels, total(b_gx, 0) * b_invstd[None, :], mask=m_c)


@triton.jit(do_not_specialize=NUMBERS)
def conv_bwd_data_kernel(
    p_grad, p_gate, p_y, p_stats, p_sums, p_weight, p_residual, p_residual_gate, p_below,
    p_below_stats, p_grad_x, p_partials,
    images, height, width, out_height, out_width, in_channels, out_channels, inverse_count,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr, PENDING: tl.constexpr, GATE: tl.constexpr, DERIVATIVE: tl.constexpr,
    HAS_SUMS: tl.constexpr, RESIDUAL: tl.constexpr, HAS_BELOW: tl.constexpr,
    BELOW_GATE: tl.constexpr, BELOW_DERIVATIVE: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, TAIL_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_x [pixels, C] = grad_y [pixels, taps*K] @ weight [taps*K, C], plus the residual's.

    A dilation comes with a stride of 1 only. p_partials [tiles, 3, C] takes the sums of the batch
    norm below; its third row stays unwritten.
    """
    group_in, group_out = in_channels // GROUPS, out_channels // GROUPS
    blocks = tl.cdiv(group_in, BLOCK_N)
    tile, column = tl.program_id(0) // (blocks * GROUPS), tl.program_id(0) % (blocks * GROUPS)
    group = column // blocks
    # A class holds at most this many rows and columns of each image.
    class_height, class_width = tl.cdiv(height, STRIDE_H), tl.cdiv(width, STRIDE_W)
    pixels = pixels_of(images, class_height, class_width, WIDE)
    tiles = tl.cdiv(pixels, BLOCK_M).to(tl.int32)
    class_h, class_w = tile // tiles // STRIDE_W, tile // tiles % STRIDE_W
    pixel = block_of(tile % tiles, BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
    m_pixel = pixel < pixels
    first_c = (column % blocks) * BLOCK_N
    m_c = first_c + tl.arange(0, BLOCK_N) < group_in
    first_h, taps_h = _taps_of(class_h, TAPS_H, STRIDE_H, PAD_H)
    first_w, taps_w = _taps_of(class_w, TAPS_W, STRIDE_W, PAD_W)
    taps: tl.constexpr = TAPS_H * TAPS_W
    flat: tl.constexpr = taps * STRIDE_H * STRIDE_W == 1 and PAD_H == 0 and PAD_W == 0
    # The output's pixel that a class's first tap leads to; the tap's number counts down from it.
    origin = pixel
    if not flat:
        image, row, col = split_pixel(pixel, class_height, class_width)
        out_row, out_col = row + (class_h + PAD_H) // STRIDE_H, col + (class_w + PAD_W) // STRIDE_W
        origin = (image * out_height + out_row) * out_width + out_col
        row, col = row * STRIDE_H + class_h, col * STRIDE_W + class_w
        m_pixel &= (row < height) & (col < width)
        pixel = (image * height + row) * width + col
    o_weight = offsets(tl.arange(0, BLOCK_K), BLOCK_N, taps * group_in)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tap_h, tap_w, first = 0, 0, 0
    for _ in range(taps_h * taps_w * tl.cdiv(group_out, BLOCK_K)):
        m_k = within(first, BLOCK_K, group_out, TAIL_K)
        m_out = m_pixel
        if not flat:
            at_row, at_col = out_row - tap_h * DILATION_H, out_col - tap_w * DILATION_W
            m_out &= inside(at_row, out_height) & inside(at_col, out_width)
        b_grad = load_gradient(
            p_grad, p_gate, p_y, p_stats, p_sums, origin,
            -(tap_h * DILATION_H * out_width + tap_w * DILATION_W), group * group_out + first,
            m_out, m_k, out_channels, inverse_count, BLOCK_K, PENDING, GATE, DERIVATIVE, HAS_SUMS,
            GROUPS == 1,
        )  # fmt: skip
        tap = (first_h + tap_h * STRIDE_H) * TAPS_W + first_w + tap_w * STRIDE_W
        moved = ((group * group_out + first).to(tl.int64) * taps + tap) * group_in
        moved += first_c
        m_weight = m_k[:, None] & m_c[None, :]
        b_weight = tl.load(p_weight + moved + o_weight, mask=m_weight, other=0.0)
        acc = dot(b_grad, b_weight, acc, PRECISION)
        first += BLOCK_K
        if taps > 1:
            tap_w, first = tap_w + (first >= group_out), tl.where(first >= group_out, 0, first)
            tap_h, tap_w = tap_h + (tap_w >= taps_w), tl.where(tap_w >= taps_w, 0, tap_w)
    first_c += group * group_in
    c = first_c + tl.arange(0, BLOCK_N)
    o_x = pixel.to(tl.int64)[:, None] * in_channels + c[None, :]
    m_x = m_pixel[:, None] & m_c[None, :]
    acc = _add_residual(
        acc, p_residual, p_residual_gate, pixel, first_c, m_pixel, o_x, m_x, in_channels,
        RESIDUAL, GROUPS == 1,
    )  # fmt: skip
    dtype: tl.constexpr = p_grad_x.dtype.element_ty
    b_grad_x = to_storage(acc, dtype)
    tl.store(p_grad_x + o_x, b_grad_x, mask=m_x)
    if HAS_BELOW:
        _store_sums(
            p_partials, p_below, p_below_stats, b_grad_x.to(tl.float32), tile, c, m_c, o_x, m_x,
            in_channels, BELOW_GATE, BELOW_DERIVATIVE, dtype,
        )  # fmt: skip
