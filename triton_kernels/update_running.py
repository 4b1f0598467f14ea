"""Running statistics of a block's batch norms: up to four of them in one launch."""

import triton
import triton.language as tl

from .arithmetic import to_storage

#: Batch norms that one launch takes.
MOST = 4

#: What an update has, by bits; one without any of them is none.
HAS_MEAN = tl.constexpr(1)
HAS_VAR = tl.constexpr(2)
HAS_COUNTER = tl.constexpr(4)
CUMULATIVE = tl.constexpr(8)
BITS = (HAS_MEAN, HAS_VAR, HAS_COUNTER, CUMULATIVE)

#: Numbers that align no access: one binary serves all their values.
NUMBERS = tuple(
    f"{name}{i}"
    for i in range(MOST)
    for name in ("channels", "mean_stride", "var_stride", "count", "momentum")
)


@triton.jit
def _blend(p_running, o_running, m, b_batch, factor):
    """running = (1 - factor)*running + factor*batch in float64."""
    b_running = tl.load(p_running + o_running, mask=m, other=0.0).to(tl.float64)
    b_running = (1.0 - factor) * b_running + factor * b_batch
    dtype: tl.constexpr = p_running.dtype.element_ty
    if dtype == tl.float64:
        tl.store(p_running + o_running, b_running, mask=m)
    else:
        tl.store(p_running + o_running, to_storage(b_running.to(tl.float32), dtype), mask=m)


@triton.jit
def _update(
    p_stats, p_mean, p_var, p_counter,
    channels, mean_stride, var_stride, count, momentum, steps,
    HAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One update. `momentum` is the bits of a float64: Triton would pass a float32.

    The counter belongs to the first program. A cumulative average has one program alone, whose
    threads have all read the counter before it is written. A norm that is there twice may lie
    otherwise in the threads the second time, so an update waits for the one before it.
    """
    pid = tl.program_id(0).to(tl.int64)
    factor = momentum.to(tl.int64).to(tl.float64, bitcast=True)
    if HAS_COUNTER & HAS:
        if CUMULATIVE & HAS:
            value = tl.load(p_counter) + 1
            factor = 1.0 / value.to(tl.float64)
            tl.debug_barrier()
            tl.store(p_counter, value)
        elif pid == 0:
            tl.store(p_counter, tl.load(p_counter) + 1)
    unbiased = count.to(tl.float64) / (count - 1).to(tl.float64)
    for step in range(steps):
        block = step * tl.num_programs(0) + pid
        channel = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        m = channel < channels
        if HAS_MEAN & HAS:
            b_batch = tl.load(p_stats + channel, mask=m, other=0.0).to(tl.float64)
            _blend(p_mean, channel * mean_stride, m, b_batch, factor)
        if HAS_VAR & HAS:
            b_batch = tl.load(p_stats + channels + channel, mask=m, other=0.0).to(tl.float64)
            _blend(p_var, channel * var_stride, m, b_batch * unbiased, factor)
    tl.debug_barrier()


@triton.jit(do_not_specialize=NUMBERS)
def update_running_kernel(
    p_stats0, p_mean0, p_var0, p_counter0, p_stats1, p_mean1, p_var1, p_counter1, p_stats2,
    p_mean2, p_var2, p_counter2, p_stats3, p_mean3, p_var3, p_counter3,
    channels0, mean_stride0, var_stride0, count0, momentum0, channels1, mean_stride1, var_stride1,
    count1, momentum1, channels2, mean_stride2, var_stride2, count2, momentum2, channels3,
    mean_stride3, var_stride3, count3, momentum3, steps,
    HAS0: tl.constexpr, HAS1: tl.constexpr, HAS2: tl.constexpr, HAS3: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The updates in their order; of those behind the last one HAS is 0."""
    _update(
        p_stats0, p_mean0, p_var0, p_counter0, channels0, mean_stride0, var_stride0,
        count0, momentum0, steps, HAS0, BLOCK,
    )  # fmt: skip
    if HAS1:
        _update(
            p_stats1, p_mean1, p_var1, p_counter1, channels1, mean_stride1, var_stride1,
            count1, momentum1, steps, HAS1, BLOCK,
        )  # fmt: skip
    if HAS2:
        _update(
            p_stats2, p_mean2, p_var2, p_counter2, channels2, mean_stride2, var_stride2,
            count2, momentum2, steps, HAS2, BLOCK,
        )  # fmt: skip
    if HAS3:
        _update(
            p_stats3, p_mean3, p_var3, p_counter3, channels3, mean_stride3, var_stride3,
            count3, momentum3, steps, HAS3, BLOCK,
        )  # fmt: skip
