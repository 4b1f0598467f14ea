"""How memory-bound kernels iterate over an activation's tiles, and how many one program takes.

An activation is a dense [rows, cols] matrix: a row is one pixel (channels_last, cols = C) or one
channel's image (contiguous, cols = H*W). A tile holds [BLOCK_ROWS, BLOCK_BYTES, 8] elements, so
that the eight bits of a mask's byte lie in one thread and, for 16-bit types, so does one 16-byte
access. A program keeps its channels and iterates along the other dimension over `chunk` rows
(channels_last) or mask bytes (contiguous): what belongs to a channel is loaded once.
"""

from typing import NamedTuple

import triton
import triton.language as tl

#: Numbers that align no access: one binary serves all their values, 1 among them. `row_bytes` is
#: not among them, since masks are read four bytes at a time where it allows, nor is `steps`, since
#: a single step needs no loop.
NUMBERS = ("rows", "chunk", "chunks", "partials", "count")


@triton.jit
def start(
    rows,
    row_bytes,
    chunk,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """First row, first byte and chunk index of this program, in 64 bits."""
    pid = tl.program_id(0).to(tl.int64)
    if CHANNELS_LAST:
        tiles = tl.cdiv(row_bytes, BLOCK_BYTES)
        row, byte = (pid // tiles) * chunk, (pid % tiles) * BLOCK_BYTES
    else:
        tiles = tl.cdiv(rows, BLOCK_ROWS)
        row, byte = (pid % tiles) * BLOCK_ROWS, (pid // tiles) * chunk
    return row, byte, pid // tiles


@triton.jit
def elements(
    row,
    byte,
    rows,
    cols,
    row_bytes,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Offsets and masks of a tile's elements [R, B, 8] and of its mask bytes [R, B]."""
    row = row + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    byte = byte + tl.arange(0, BLOCK_BYTES).to(tl.int64)
    col = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    o_element = row[:, None, None] * cols + col[None, :, :]
    m_element = (row < rows)[:, None, None] & (col < cols)[None, :, :]
    o_byte = row[:, None] * row_bytes + byte[None, :]
    m_byte = (row < rows)[:, None] & (byte < row_bytes)[None, :]
    return o_element, m_element, o_byte, m_byte


@triton.jit
def channel_of(
    row, byte, rows, cols, channels,
    CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """Channel of each element and whether it exists: [1, B, 8] or [R, 1, 1]."""
    if CHANNELS_LAST:
        byte = byte + tl.arange(0, BLOCK_BYTES).to(tl.int64)
        channel = (byte[:, None] * 8 + tl.arange(0, 8)[None, :])[None, :, :]
        m_channel = channel < cols
    else:
        row = (row + tl.arange(0, BLOCK_ROWS).to(tl.int64))[:, None, None]
        channel, m_channel = row % channels, row < rows
    return channel, m_channel


@triton.jit
def load_values(p, offset, mask):
    """Elements as float32; what is masked out reads as zero."""
    return tl.load(p + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def unpack_bits(p_mask, o_byte, m_byte):
    """The gate of a tile's elements, [R, B, 8]."""
    b_mask = tl.load(p_mask + o_byte, mask=m_byte, other=0).to(tl.int32)
    return ((b_mask[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1) != 0


@triton.jit
def store_bits(p_mask, o_byte, m_byte, b_open):
    """Pack [R, B, 8] booleans into bytes and store them."""
    b_bits = b_open.to(tl.int32) << tl.arange(0, 8)[None, None, :]
    tl.store(p_mask + o_byte, tl.sum(b_bits, axis=2).to(tl.uint8), mask=m_byte)


# ---------------------------------------------------------------- launch shapes


class Tiling(NamedTuple):
    """What one program of a memory-bound kernel takes."""

    block_rows: int
    block_bytes: int
    steps: int
    num_warps: int

    def chunk(self, channels_last: bool) -> int:
        """Rows (channels_last) or mask bytes (contiguous) over which a program iterates."""
        return self.steps * (self.block_rows if channels_last else self.block_bytes)

    def chunks(self, rows: int, row_bytes: int, channels_last: bool) -> int:
        """Programs along that dimension: the partial results per channel or row."""
        return triton.cdiv(rows if channels_last else row_bytes, self.chunk(channels_last))

    def grid(self, rows: int, row_bytes: int, channels_last: bool) -> tuple[int]:
        """One-dimensional, since the other axes of a grid end at 65,535."""
        across = (
            triton.cdiv(row_bytes, self.block_bytes)
            if channels_last
            else triton.cdiv(rows, self.block_rows)
        )
        return (across * self.chunks(rows, row_bytes, channels_last),)


#: (elements of a tile, warps, programs per multiprocessor to aim at). The first is the heuristic:
#: 4,096 elements in 128 threads are four 16-byte accesses per tensor and thread in flight, and
#: eight programs of four warps fill half of a multiprocessor's 64 warps.
_SHAPES = (
    (4096, 4, 8),
    (2048, 4, 16),
    (1024, 4, 32),
    (4096, 8, 8),
    (8192, 8, 4),
    (2048, 4, 8),
    (4096, 4, 32),
)

#: More iterations save nothing more and leave the last wave of programs uneven.
_MOST_STEPS = 64


def tilings(
    rows: int, row_bytes: int, channels_last: bool, processors: int, widest: int = 8192
) -> list[Tiling]:
    """Candidate tilings of a [rows, 8*row_bytes] activation; the heuristic's choice comes first.

    Args:
        rows: of the matrix.
        row_bytes: mask bytes per row, ceil(cols / 8).
        channels_last: whether a row is a pixel.
        processors: multiprocessors of the device.
        widest: most elements of a tile, for kernels that keep accumulators per element.
    """
    candidates = [
        _tiling(rows, row_bytes, channels_last, processors, *shape)
        for shape in _SHAPES
        if shape[0] <= widest
    ]
    return list(dict.fromkeys(candidates))


def _tiling(
    rows: int,
    row_bytes: int,
    channels_last: bool,
    processors: int,
    size: int,
    warps: int,
    per_processor: int,
) -> Tiling:
    widest = 64 if channels_last else size // 8
    block_bytes = min(widest, size // 8, triton.next_power_of_2(max(row_bytes, 1)))
    block_rows = min(size // 8 // block_bytes, triton.next_power_of_2(max(rows, 1)))
    tiles = triton.cdiv(rows, block_rows) * triton.cdiv(row_bytes, block_bytes)
    along = triton.cdiv(rows, block_rows) if channels_last else triton.cdiv(row_bytes, block_bytes)
    steps = max(1, min(_MOST_STEPS, along, tiles // (processors * per_processor)))
    return Tiling(block_rows, block_bytes, steps, warps)
