"""What the convolution kernels share: pixels, taps, prologues, and launch shapes.

A convolution is an implicit matrix product over channels_last tensors: rows are pixels, columns
channels, and one loop iterates over the filter's taps and the channels that are summed over.
Groups lie side by side in the columns. The derivations stand in README.md.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .activations import backward
from .arithmetic import (
    GATE_AFFINE,
    GATE_MASK,
    SCALE,
    SHIFT,
    affine,
    bn_gradient,
    to_storage,
)
from .bn_act import load_bn
from .tiling import load_values

#: Numbers that align no access: one binary serves all their values, 1 among them.
NUMBERS = ("images", "height", "width", "out_height", "out_width", "pixels", "steps")


@triton.jit
def pixels_of(images, height, width, WIDE: tl.constexpr):
    """images*height*width; pixels are counted in 64 bits where 32 might not do."""
    if WIDE:
        images = images.to(tl.int64)
    return images * height * width


@triton.jit
def block_of(index, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """First of the `SIZE` pixels of a block."""
    if WIDE:
        index = index.to(tl.int64)
    return index * SIZE


@triton.jit
def _unsigned(v):
    return v.to(tl.uint64) if v.dtype == tl.int64 else v.to(tl.uint32)


@triton.jit
def split_pixel(pixel, height, width):
    """(image, row, column) of a pixel's index; divisions without a sign take fewer instructions."""
    line = (_unsigned(pixel) // _unsigned(width)).to(pixel.dtype)
    image = (_unsigned(line) // _unsigned(height)).to(pixel.dtype)
    return image, line - image * height, pixel - line * width


@triton.jit
def inside(position, size):
    """0 <= position < size, in one comparison: what is negative is large without its sign."""
    return _unsigned(position) < _unsigned(size)


@triton.jit
def offsets(row, LANES: tl.constexpr, length):
    """Of [rows, LANES] elements in a matrix whose rows have a length, in 64 bits.

    In a loop they stay as they are: what moves is the pointer that they are added to.
    """
    return row.to(tl.int64)[:, None] * length + tl.arange(0, LANES)[None, :]


@triton.jit
def within(first, LANES: tl.constexpr, size, TAIL: tl.constexpr):
    """Which of the lanes from `first` on are less than `size`: all, but for a tail."""
    if TAIL:
        return first + tl.arange(0, LANES) < size
    else:
        return tl.full([LANES], True, tl.int1)


@triton.jit
def normalised(
    b_x, p_stats, channel, m_channel, channels, m_row, ACT: tl.constexpr, PADDED: tl.constexpr
):
    """act(scale*x + shift) of a tile [pixels, channels], rounded as if it had been stored.

    For channels that are none, whose scale and shift are zero, it is act(0), and what it meets in a
    product is zero. It is zero in the padding, which comes after the prologue. Pixels past the last
    one may hold anything: nobody reads their results, and their gradients are zero.
    """
    b_scale = load_values(p_stats + SCALE * channels, channel, m_channel)
    b_shift = load_values(p_stats + SHIFT * channels, channel, m_channel)
    b_z = ACT(affine(b_x.to(tl.float32), b_scale[None, :], b_shift[None, :]))
    if PADDED:
        b_z = tl.where(m_row[:, None], b_z, 0.0)
    return to_storage(b_z, b_x.dtype)


@triton.jit
def open_bits(p_mask, row, first, m_row, channels, LANES: tl.constexpr, WHOLE: tl.constexpr):
    """Bits of a mask for a tile [pixels, LANES channels]; WHOLE if it starts where a byte does.

    Bits of channels that are none may be anything.
    """
    row_bytes = (channels + 7) // 8
    p_mask += row.to(tl.int64)[:, None] * row_bytes
    if WHOLE:
        byte = first // 8 + tl.arange(0, LANES // 8)
        m = m_row[:, None] & (byte < row_bytes)[None, :]
        b_byte = tl.load(p_mask + byte[None, :], mask=m, other=0).to(tl.int32)
        b_bits = b_byte[:, :, None] >> tl.arange(0, 8)[None, None, :]
        return (tl.reshape(b_bits, [b_byte.shape[0], LANES]) & 1) != 0
    else:
        channel = first + tl.arange(0, LANES)
        m = m_row[:, None] & (channel < channels)[None, :]
        b_byte = tl.load(p_mask + (channel // 8)[None, :], mask=m, other=0).to(tl.int32)
        return ((b_byte >> (channel % 8)[None, :]) & 1) != 0


@triton.jit
def load_gradient(
    p_grad, p_gate, p_y, p_stats, p_sums,
    row, shift, first, m_row, m_channel, channels, inverse_count,
    LANES: tl.constexpr, PENDING: tl.constexpr, GATE: tl.constexpr, DERIVATIVE: tl.constexpr,
    HAS_SUMS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile [pixels, LANES channels] of grad_y: as it lies, or formed from what is pending on it.

    Its pixels are row + shift, its channels start at `first`, which is WHOLE bytes of a mask; both
    move with a loop, `row` does not.
    """
    o, m = offsets(row, LANES, channels), m_row[:, None] & m_channel[None, :]
    moved = shift.to(tl.int64) * channels + first
    b_grad = tl.load(p_grad + moved + o, mask=m, other=0.0)
    if PENDING:
        dtype: tl.constexpr = b_grad.dtype
        channel = first + tl.arange(0, LANES)
        b_g = b_grad.to(tl.float32)
        b_y = b_g
        if HAS_SUMS or GATE == GATE_AFFINE:
            b_y = load_values(p_y + moved, o, m)
        b_scale, b_mean, b_slope, b_mean_g = load_bn(
            p_stats, p_sums, 1, channel, m_channel, channels, inverse_count, HAS_SUMS
        )
        if GATE == GATE_MASK:
            p_gate += shift.to(tl.int64) * ((channels + 7) // 8)
            b_open = open_bits(p_gate, row, first, m_row, channels, LANES, WHOLE)
            b_g = tl.where(b_open, b_g, 0.0)
        elif GATE == GATE_AFFINE:
            b_shift = load_values(p_stats + SHIFT * channels, channel, m_channel)
            b_v = affine(b_y, b_scale[None, :], b_shift[None, :])
            b_g = backward(b_g, b_v, dtype, DERIVATIVE)
        # Channels that are none have zeros for all of these, so only pixels need a mask.
        b_value = b_g * b_scale[None, :]
        if HAS_SUMS:
            b_value = bn_gradient(
                b_g, b_y, b_mean[None, :], b_scale[None, :], b_slope[None, :], b_mean_g[None, :]
            )
            b_value = tl.where(m_row[:, None], b_value, 0.0)
        b_grad = to_storage(b_value, dtype)
    return b_grad


# ---------------------------------------------------------------- launch shapes


class Tile(NamedTuple):
    """What one program of a matrix product computes: [m, n] results, `k` terms at a time.

    With `descriptors` by the copy engine and a persistent grid, with `specialised` by warps that
    load beside warps that multiply.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    specialised: bool = False

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the pipelined operand tiles."""
        return self.num_stages * (self.m + self.n) * self.k * itemsize

    @property
    def results(self) -> int:
        """Results that a thread holds, each in a register."""
        return self.m * self.n // (32 * self.num_warps)

    @property
    def options(self) -> dict[str, int]:
        """The launch's options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def constants(self) -> dict[str, int]:
        """The constexpr parameters."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


#: Best first for a problem that fills the device with them; see README.md.
_TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(128, 64, 32, 4, 4),
    Tile(64, 64, 64, 4, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 64, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 32, 64, 4, 4),
    Tile(128, 32, 32, 4, 4),
    Tile(32, 32, 32, 4, 4),
    Tile(64, 256, 32, 8, 4),
)

#: Most results of a thread where another tensor of their shape is read: twice as many spill.
_BESIDE_OTHERS = 64

#: Rows that a group of four warps multiplies together.
_WARPGROUP_ROWS = 64


def tiles(
    rows: int,
    columns: int,
    depth: int,
    itemsize: int,
    processors: int,
    shared: int,
    formed: bool = True,
    alone: bool = True,
    warpgroups: bool = False,
) -> list[Tile]:
    """Candidate tiles for a [rows, depth] x [depth, columns] product; the heuristic's first.

    Tiles are narrowed to the problem; left out are those whose operands do not fit `shared`
    bytes, whose results leave no registers for what is read after the products, and, where there
    are others, those too low for the matrix units. The heuristic takes the first that still makes a
    program for every multiprocessor, and else the smallest.

    Args:
        rows: of the result.
        columns: of the result, of one group.
        depth: terms of one tap and group.
        itemsize: bytes of an operand's element.
        processors: multiprocessors of the device.
        shared: bytes of shared memory that a program may have.
        formed: whether grad_y lies in memory, or is formed from three tensors on the way in.
        alone: whether nothing of the result's shape is read after the products.
        warpgroups: whether four warps multiply together, 64 rows at least (Hopper and newer).
    """
    # Bytes of a row of an operand's tile: more of them would not fit the registers.
    widest = (128 if formed else 64) // itemsize
    columns_most = _padded(columns) if itemsize < 4 else min(64, _padded(columns))
    limits = (_padded(rows), columns_most, min(_padded(depth), widest))
    narrowed = [_narrowed(tile, limits) for tile in _TILES]
    fitting = dict.fromkeys(t for t in narrowed if t.shared_bytes(itemsize) <= shared)
    candidates = [t for t in fitting if alone or t.results <= _BESIDE_OTHERS] or [*fitting]
    if warpgroups:
        candidates = [t for t in candidates if t.m >= _WARPGROUP_ROWS] or candidates
    smallest = min(candidates, key=lambda tile: tile.m * tile.n)

    def fills(tile: Tile) -> bool:
        return triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n) >= processors

    best = next(filter(fills, candidates), smallest)
    return [best, *(t for t in candidates if t != best)]


def _padded(size: int) -> int:
    """The next power of two, at least 16: what the matrix units take."""
    return max(16, triton.next_power_of_2(size))


def _narrowed(tile: Tile, limits: tuple[int, int, int]) -> Tile:
    m, n, k = (min(have, limit) for have, limit in zip(tile[:3], limits, strict=True))
    return Tile(m, n, k, tile.num_warps, tile.num_stages)
