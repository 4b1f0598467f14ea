"""act(x + residual) and its backward, with the activation's gate kept as one bit per element.

Activations are seen as a dense [rows, cols] matrix, a row being one pixel (channels_last) or one
channel's image (contiguous); a row of the mask is ceil(cols / 8) bytes. A tile holds
[BLOCK_ROWS, BLOCK_BYTES, 8] elements, so that a byte's bits lie in one thread and, for 16-bit
types, so does one 16-byte access.
"""

import triton
import triton.language as tl

from .rounding import to_storage


@triton.jit
def _tile(rows, cols, row_bytes, BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr):
    """Offsets and masks of this program's elements and of their mask bytes, in 64 bits."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(row_bytes, BLOCK_BYTES)
    row = (pid // tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    byte = (pid % tiles) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES).to(tl.int64)
    col = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    o_element = row[:, None, None] * cols + col[None, :, :]
    m_element = (row < rows)[:, None, None] & (col < cols)[None, :, :]
    o_byte = row[:, None] * row_bytes + byte[None, :]
    m_byte = (row < rows)[:, None] & (byte < row_bytes)[None, :]
    return o_element, m_element, o_byte, m_byte


@triton.jit
def add_act_fwd_kernel(
    p_x,
    p_residual,
    p_out,
    p_mask,
    rows,
    cols,
    row_bytes,
    RELU: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    o_element, m_element, o_byte, m_byte = _tile(rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES)
    b_x = tl.load(p_x + o_element, mask=m_element, other=0.0)
    b_residual = tl.load(p_residual + o_element, mask=m_element, other=0.0)
    if p_x.dtype.element_ty != tl.float64:
        b_x, b_residual = b_x.to(tl.float32), b_residual.to(tl.float32)
    b_sum = b_x + b_residual
    if RELU:
        # A comparison, not a maximum: torch's ReLU lets NaN and -0.0 through.
        b_sum = tl.where(b_sum < 0.0, 0.0, b_sum)
    b_out = to_storage(b_sum, p_out.dtype.element_ty)
    tl.store(p_out + o_element, b_out, mask=m_element)
    if HAS_MASK:
        b_open = m_element
        if RELU:
            b_open = m_element & ~(b_out.to(tl.float32) <= 0.0)
        b_bits = b_open.to(tl.int32) << tl.arange(0, 8)[None, None, :]
        tl.store(p_mask + o_byte, tl.sum(b_bits, axis=2).to(tl.uint8), mask=m_byte)


@triton.jit
def act_bwd_kernel(
    p_grad_out,
    p_mask,
    p_grad,
    rows,
    cols,
    row_bytes,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    o_element, m_element, o_byte, m_byte = _tile(rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES)
    b_mask = tl.load(p_mask + o_byte, mask=m_byte, other=0).to(tl.int32)
    b_open = ((b_mask[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1) != 0
    b_grad = tl.load(p_grad_out + o_element, mask=m_element, other=0.0)
    zero = tl.zeros_like(b_grad)
    tl.store(p_grad + o_element, tl.where(b_open, b_grad, zero), mask=m_element)


def tile_shape(cols: int) -> tuple[int, int]:
    """(BLOCK_ROWS, BLOCK_BYTES) for rows of `cols` elements: about 1,024 elements a program."""
    block_bytes = min(128, triton.next_power_of_2((cols + 7) // 8))
    return 128 // block_bytes, block_bytes


def grid(rows: int, row_bytes: int, block_rows: int, block_bytes: int) -> tuple[int]:
    """One-dimensional, since the other axes of a grid end at 65,535."""
    return (triton.cdiv(rows, block_rows) * triton.cdiv(row_bytes, block_bytes),)
