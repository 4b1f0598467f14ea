"""act(x + residual) and its backward, with the activation's gate kept as one bit per element."""

import triton
import triton.language as tl

from .arithmetic import GATE_MASK, to_storage
from .tiling import NUMBERS, elements, load_values, start, store_bits, unpack_bits


@triton.jit(do_not_specialize=NUMBERS)
def add_act_fwd_kernel(
    p_x, p_residual, p_out, p_mask,
    rows, cols, row_bytes, channels, chunk, chunks, steps,
    ACT: tl.constexpr, DERIVATIVE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    row, byte, _ = start(rows, row_bytes, chunk, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES)
    for _step in range(steps):
        o_element, m_element, o_byte, m_byte = elements(
            row, byte, rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES
        )
        b_sum = load_values(p_x, o_element, m_element)
        b_sum += load_values(p_residual, o_element, m_element)
        b_out = to_storage(ACT(b_sum), p_out.dtype.element_ty)
        tl.store(p_out + o_element, b_out, mask=m_element)
        if HAS_MASK:
            b_open = DERIVATIVE(b_out.to(tl.float32))
            store_bits(p_mask, o_byte, m_byte, m_element & b_open)
        if CHANNELS_LAST:
            row += BLOCK_ROWS
        else:
            byte += BLOCK_BYTES


@triton.jit(do_not_specialize=NUMBERS)
def act_bwd_kernel(
    p_grad_out, p_gate, p_grad,
    rows, cols, row_bytes, channels, chunk, chunks, steps,
    GATE: tl.constexpr, DERIVATIVE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    row, byte, _ = start(rows, row_bytes, chunk, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES)
    for _step in range(steps):
        o_element, m_element, o_byte, m_byte = elements(
            row, byte, rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES
        )
        if GATE == GATE_MASK:
            b_open = unpack_bits(p_gate, o_byte, m_byte)
        else:
            b_open = DERIVATIVE(load_values(p_gate, o_element, m_element))
        b_grad = tl.load(p_grad_out + o_element, mask=m_element, other=0.0)
        b_grad = tl.where(b_open, b_grad, tl.zeros_like(b_grad))
        tl.store(p_grad + o_element, b_grad, mask=m_element)
        if CHANNELS_LAST:
            row += BLOCK_ROWS
        else:
            byte += BLOCK_BYTES
