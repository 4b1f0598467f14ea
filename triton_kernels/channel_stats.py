"""Batch statistics: per-chunk (count, mean, M2), their ordered merge, and scale and shift.

Welford's recurrence per lane, Chan's formula across lanes and chunks (Welford 1962; Chan, Golub
and LeVeque 1979): no sum of squares, and no atomics, so two runs give the same bits.
"""

import triton
import triton.language as tl

from .arithmetic import INVSTD, MEAN, SCALE, SHIFT, total
from .tiling import NUMBERS, elements, load_values, start

#: Partials that one program merges, how many at a time, and for how many channels.
MERGE = {"GROUP": 512, "ROWS": 128, "CHANNELS": 16}


@triton.jit
def merge(b_count, b_base, b_mean, b_m2, AXIS: tl.constexpr):
    """Chan's formula along one axis of [A, B] partials, which stays with size 1.

    A mean is base + mean, the second of them small: where means are large against the spread, one
    float32 would round off what their differences say about the variance.
    """
    filled = b_count > 0
    count = total(b_count, AXIS)
    share = 1.0 / tl.maximum(count, 1.0)
    base = total(tl.where(filled, b_count * (b_base + b_mean), 0.0), AXIS) * share
    b_mean = (b_base - base) + b_mean
    mean = total(tl.where(filled, b_count * b_mean, 0.0), AXIS) * share
    b_delta = b_mean - mean
    m2 = total(tl.where(filled, b_m2 + b_count * b_delta * b_delta, 0.0), AXIS)
    return count, base, mean, m2


@triton.jit
def spread(b_v, m, count):
    """Partial statistics over the rows of [A, B] values, `count` of which exist: two passes."""
    base = total(tl.where(m, b_v, 0.0), 0) / count
    # Cut to the grid of the largest value, the difference to that value is exact: an outlier would
    # else bring its own rounding into a variance that it makes up alone.
    grid = 2.0 * tl.max(tl.where(m, tl.abs(b_v), 0.0), axis=0)[None, :]
    base = (base + grid) - grid
    b_v = tl.where(m, b_v - base, 0.0)
    mean = total(b_v, 0) / count
    b_v = tl.where(m, b_v - mean, 0.0)
    return base, mean, total(b_v * b_v, 0)


@triton.jit
def store_partial(p_partials, o_partial, base, mean, m2, channels, mask):
    """One partial [3, C]: base and mean, whose sum is the mean, and M2."""
    tl.store(p_partials + o_partial, base, mask=mask)
    tl.store(p_partials + o_partial + channels, mean, mask=mask)
    tl.store(p_partials + o_partial + 2 * channels, m2, mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def channel_stats_fwd_kernel(
    p_y, p_partials, p_counts,
    rows, cols, row_bytes, channels, chunk, chunks, steps,
    CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    row, byte, index = start(rows, row_bytes, chunk, CHANNELS_LAST, BLOCK_ROWS, BLOCK_BYTES)
    o_row = row + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    o_col = byte * 8 + tl.arange(0, BLOCK_BYTES * 8).to(tl.int64)[None, :]
    # Relative to the lane's first value, Welford's rounding errors are those of numbers as large
    # as the spread, however large the mean is.
    o_element, m_element, _, _ = elements(row, byte, rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES)
    b_first = load_values(p_y, o_element, m_element)
    b_mean = tl.zeros([BLOCK_ROWS, BLOCK_BYTES, 8], tl.float32)
    b_m2 = tl.zeros([BLOCK_ROWS, BLOCK_BYTES, 8], tl.float32)
    for step in range(steps):
        o_element, m_element, _, _ = elements(
            row, byte, rows, cols, row_bytes, BLOCK_ROWS, BLOCK_BYTES
        )
        b_y = load_values(p_y, o_element, m_element) - b_first
        # A lane that is masked out stays so: whoever got this far has seen `step` values.
        b_delta = b_y - b_mean
        b_mean = tl.where(m_element, b_mean + b_delta / (step + 1.0), b_mean)
        b_m2 = tl.where(m_element, b_m2 + b_delta * (b_y - b_mean), b_m2)
        if CHANNELS_LAST:
            row += BLOCK_ROWS
        else:
            byte += BLOCK_BYTES
    b_first = tl.reshape(b_first, [BLOCK_ROWS, BLOCK_BYTES * 8])
    b_mean = tl.reshape(b_mean, [BLOCK_ROWS, BLOCK_BYTES * 8])
    b_m2 = tl.reshape(b_m2, [BLOCK_ROWS, BLOCK_BYTES * 8])
    if CHANNELS_LAST:
        b_count = _visits(o_row, rows, BLOCK_ROWS, steps) + tl.zeros_like(b_mean)
        b_count, b_first, b_mean, b_m2 = merge(b_count, b_first, b_mean, b_m2, AXIS=0)
        channel, m_channel, partial = o_col, o_col < cols, index
    else:
        b_count = _visits(o_col, cols, BLOCK_BYTES * 8, steps) + tl.zeros_like(b_mean)
        b_count, b_first, b_mean, b_m2 = merge(b_count, b_first, b_mean, b_m2, AXIS=1)
        channel, m_channel = o_row % channels, o_row < rows
        partial = (o_row // channels) * chunks + index
    o_partial = partial * 3 * channels + channel
    store_partial(p_partials, o_partial, b_first, b_mean, b_m2, channels, m_channel)
    # All channels of a partial hold as many values: the first one says how many.
    o_count = partial + tl.zeros_like(channel)
    b_count += tl.zeros_like(b_mean)
    tl.store(p_counts + o_count, b_count, mask=m_channel & (channel == 0))


@triton.jit
def _visits(first, size, STRIDE: tl.constexpr, steps):
    """How many of first, first + STRIDE, ... (`steps` of them) lie below `size`."""
    return tl.minimum(tl.maximum((size - first + STRIDE - 1) // STRIDE, 0), steps).to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS)
def merge_stats_kernel(
    p_partials, p_counts, p_merged, p_merged_counts,
    partials, channels,
    LAST: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge `GROUP` partials [3, C] into one, in their order; LAST leaves (mean, M2)."""
    group = tl.program_id(0).to(tl.int64) // tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0).to(tl.int64) % tl.cdiv(channels, CHANNELS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    m_channel = channel < channels
    count = tl.zeros([1, CHANNELS], tl.float32)
    base = tl.zeros([1, CHANNELS], tl.float32)
    mean = tl.zeros([1, CHANNELS], tl.float32)
    m2 = tl.zeros([1, CHANNELS], tl.float32)
    for first in range(0, GROUP, ROWS):
        partial = group * GROUP + first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        m_partial = (partial < partials) & m_channel
        o_partial = partial * 3 * channels + channel
        b_count = tl.load(p_counts + partial, mask=partial < partials, other=0.0)
        b_base = tl.load(p_partials + o_partial, mask=m_partial, other=0.0)
        b_mean = tl.load(p_partials + o_partial + channels, mask=m_partial, other=0.0)
        b_m2 = tl.load(p_partials + o_partial + 2 * channels, mask=m_partial, other=0.0)
        b_count, b_base, b_mean, b_m2 = merge(
            b_count + tl.zeros_like(b_mean), b_base, b_mean, b_m2, AXIS=0
        )
        base = tl.where(count > 0, base, b_base)
        share = tl.where(b_count > 0, b_count / tl.maximum(count + b_count, 1.0), 0.0)
        delta = tl.where(b_count > 0, ((b_base - base) + b_mean) - mean, 0.0)
        mean += delta * share
        m2 += b_m2 + delta * delta * count * share
        count += b_count
    if LAST:
        tl.store(p_merged + channel, base + mean, mask=m_channel)
        tl.store(p_merged + channels + channel, m2, mask=m_channel)
    else:
        o_merged = group * 3 * channels + channel
        store_partial(p_merged, o_merged, base, mean, m2, channels, m_channel)
        tl.store(p_merged_counts + group + tl.zeros_like(channel), count, mask=channel == 0)


@triton.jit(do_not_specialize=NUMBERS)
def finalize_stats_fwd_kernel(
    p_state, p_mean, p_var, p_weight, p_bias, p_stats,
    channels, count, eps,
    HAS_STATE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(mean, var, invstd, scale, shift) of each channel, computed in float64."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = channel < channels
    if HAS_STATE:
        mean = tl.load(p_state + channel, mask=m, other=0.0).to(tl.float64)
        var = tl.load(p_state + channels + channel, mask=m, other=1.0).to(tl.float64)
        var = var / tl.maximum(count, 1)
    else:
        mean = tl.load(p_mean + channel, mask=m, other=0.0).to(tl.float64)
        var = tl.load(p_var + channel, mask=m, other=1.0).to(tl.float64)
    invstd = 1.0 / tl.sqrt(var + eps)
    scale = invstd
    if HAS_WEIGHT:
        scale = tl.load(p_weight + channel, mask=m, other=0.0).to(tl.float64) * invstd
    shift = -mean * scale
    if HAS_BIAS:
        shift += tl.load(p_bias + channel, mask=m, other=0.0).to(tl.float64)
    tl.store(p_stats + MEAN * channels + channel, mean.to(tl.float32), mask=m)
    tl.store(p_stats + channels + channel, var.to(tl.float32), mask=m)
    tl.store(p_stats + INVSTD * channels + channel, invstd.to(tl.float32), mask=m)
    tl.store(p_stats + SCALE * channels + channel, scale.to(tl.float32), mask=m)
    tl.store(p_stats + SHIFT * channels + channel, shift.to(tl.float32), mask=m)
