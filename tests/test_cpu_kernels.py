"""The compiled CPU module on its own, against the formulas evaluated in float64.

Tolerances: ``u`` is half the spacing of numbers at 1 in the arithmetic type (2^-24 for storage in
float32, bfloat16 and float16, 2^-53 for float64). A result that takes k roundings of terms t_i is
within k * u * sum(|t_i|) of the truth, plus one rounding to the storage type. Each bound below
says its k. Comparisons ask for ``error <= bound``, so a NaN on one side alone fails.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch

from fastres import _cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [0, 1]  # channels_last, contiguous
NONE, MASK, AFFINE, OUTPUT = range(4)
# Odd on purpose: rows shorter than a register, one more than a register, several slabs of columns.
SHAPES = [(1, 1, 1), (5, 3, 49), (1, 17, 49), (5, 64, 1), (5, 100, 49), (2, 17, 300), (3, 530, 9)]
EPS = 1e-5


@pytest.fixture(params=_cpu.isas())
def isa(request):
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def acc_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def u_of(dtype):
    return torch.finfo(dtype).eps / 2


class Activation:
    """A dense activation in one of the two layouts, seen as [N, C, HW]."""

    def __init__(self, logical, dtype, layout):
        self.layout = layout
        self.n, self.c, self.hw = logical.shape
        stored = logical.to(dtype)
        self.memory = (stored.transpose(1, 2) if layout == 0 else stored).clone(
            memory_format=torch.contiguous_format
        )

    @classmethod
    def random(cls, shape, dtype, layout, seed=0, mean=0.0, std=1.0):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean
        return cls(values, dtype, layout)

    @classmethod
    def empty_like(cls, other):
        return cls(torch.full((other.n, other.c, other.hw), torch.nan), other.dtype, other.layout)

    @property
    def dtype(self):
        return self.memory.dtype

    @property
    def ptr(self):
        return self.memory.data_ptr()

    @property
    def stored(self):
        return self.memory.transpose(1, 2) if self.layout == 0 else self.memory

    @property
    def truth(self):
        return self.stored.double()

    def sizes(self, threads=2):
        sizes = {"n": self.n, "c": self.c, "hw": self.hw, "layout": self.layout}
        return {**sizes, "dtype": self.code, "threads": threads}

    @property
    def code(self):
        return DTYPES.index(self.dtype)

    def empty_mask(self):
        rows, cols = self.memory.shape[0] * self.memory.shape[1], self.memory.shape[2]
        return torch.full((rows, (cols + 7) // 8), 0xAA, dtype=torch.uint8)

    def mask_bits(self, mask):
        """A packed mask as booleans [N, C, HW]; padding bits must be zero."""
        bits = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        bits = bits.flatten(1)
        cols = self.memory.shape[2]
        assert not bits[:, cols:].any()
        bits = bits[:, :cols].bool().reshape(self.memory.shape)
        return bits.transpose(1, 2) if self.layout == 0 else bits


def assert_within(actual, expected, bound):
    """Element by element; NaN and infinities must be where they are expected."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    close = (actual - expected).abs() <= bound
    wrong = ~(same | close)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} wrong, first: {actual[wrong][0]} instead of "
        f"{expected[wrong][0]}"
    )


def storage_bound(expected, dtype):
    """One rounding to the storage type: relative u, or half of the smallest subnormal."""
    info = torch.finfo(dtype)
    return u_of(dtype) * expected.abs() + info.smallest_normal * info.eps / 2


def parameters(c, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(c, generator=generator, dtype=torch.float64).to(acc_of(dtype))
            for _ in range(2)]  # fmt: skip


def channel_stats(y, threads=2, state=None, prior_count=0):
    state = torch.full((2, y.c), torch.nan, dtype=torch.float64) if state is None else state
    _cpu.channel_stats(y.ptr, state.data_ptr(), prior_count, **y.sizes(threads))
    return state


def finalize(state, count, c, dtype, weight=None, bias=None, eps=EPS):
    stats = torch.full((5, c), torch.nan, dtype=acc_of(dtype))
    pointers = [0 if t is None else t.data_ptr() for t in (weight, bias)]
    _cpu.finalize_stats(
        state.data_ptr(), count, 0, 0, *pointers, eps, stats.data_ptr(), c, DTYPES.index(dtype)
    )
    return stats


def stats_of(y, seed=7):
    weight, bias = parameters(y.c, y.dtype, seed)
    return finalize(channel_stats(y), y.n * y.hw, y.c, y.dtype, weight, bias)


def column(values):
    return values.double()[:, None]


def relu(v):
    return torch.where(v < 0, torch.zeros_like(v), v)


# ---- statistics ----


def check_stats(state, y):
    truth = y.truth.transpose(0, 1).flatten(1)
    mean = truth.mean(1)
    m2 = (truth - mean[:, None]).square().sum(1)
    u = u_of(acc_of(y.dtype))
    std = (m2 / truth.shape[1]).sqrt()
    # d = y - shift is one rounding and its sum of eight terms seven; the shift lies within two
    # standard deviations of the mean, so |d| averages at most three. Joining is in float64.
    assert_within(state[0], mean, 8 * u * 3 * std + 2**-48 * truth.abs().amax(1))
    # The square adds one rounding, the sum of squares is at most five times m2, and correcting it
    # for the shift takes off twice offset * sum_d. Roundings of both signs average out over a
    # block, hence the bound of one term (10 roundings) for the sum. A partial mean is kept to
    # 2^-53 of itself, which shifts delta^2 * count by 2 * delta * that; delta is below std.
    count = truth.shape[1]
    bound = 10 * u * 5 * m2 + 2**-48 * m2 + 2**-51 * truth.abs().amax(1) * std * count
    assert_within(state[1], m2, bound)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_stats(isa, dtype, layout):
    for shape in SHAPES:
        for mean, std in [(0, 1), (100, 1), (1e4, 1)] if dtype != torch.float16 else [(0, 1)]:
            y = Activation.random(shape, dtype, layout, mean=mean, std=std)
            check_stats(channel_stats(y), y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_of_many_blocks(isa, dtype, layout):
    y = Activation.random((9, 40, 1100), dtype, layout, mean=3)
    check_stats(channel_stats(y), y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_channel_has_no_variance(isa, dtype, layout):
    y = Activation(torch.full((5, 17, 49), 0.1), dtype, layout)
    state = channel_stats(y)
    assert torch.equal(state[0], y.truth[0, :, 0])
    assert torch.equal(state[1], torch.zeros(17, dtype=torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("position", [0, 100, 243])
def test_one_outlier(isa, layout, position):
    values = torch.randn(5, 3, 49, generator=torch.Generator().manual_seed(1))
    values.transpose(0, 1).reshape(3, -1)
    values[position // 49, 1, position % 49] = 1e6
    y = Activation(values, torch.float32, layout)
    check_stats(channel_stats(y), y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shift_guessed_badly_is_guessed_again(isa, layout):
    # The samples behind the first guess all read 1e4, everything else is near zero.
    values = torch.randn(1, 4, 4096, generator=torch.Generator().manual_seed(2)) * 1e-3
    values[:, :, ::512] = 1e4
    y = Activation(values, torch.float32, layout)
    check_stats(channel_stats(y), y)
    values[:, :, ::512] = 0.0
    values += 1e4
    y = Activation(values, torch.float32, layout)
    check_stats(channel_stats(y), y)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_values_stay_in_their_channel(isa, dtype, layout, bad):
    shape = (5, 17, 49)
    clean = Activation.random(shape, dtype, layout)
    values = clean.truth.clone()
    values[3, 16, 48] = bad
    y = Activation(values, dtype, layout)
    state, expected = channel_stats(y), channel_stats(clean)
    assert torch.equal(state[:, :16], expected[:, :16])
    assert not state[0, 16].isfinite() and state[1, 16].isnan()
    stats = stats_of(clean)
    stats[:, 16] = bad
    grad = Activation.random(shape, dtype, layout, seed=1)
    sums = reduce_backward(grad, NONE, 0, y, stats, y, stats)
    expected = reduce_backward(grad, NONE, 0, clean, stats, clean, stats)
    assert torch.equal(sums[:, :16], expected[:, :16])
    assert sums[1:, 16].isnan().all()
    assert sums.isfinite()[:, :16].all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(isa, dtype, layout):
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-4, 5, (4, 24, 64), generator=generator).double()
    values[..., 1::2] = -values[..., ::2]  # every channel's mean is 0
    y = Activation(values, dtype, layout)
    state = channel_stats(y)
    assert torch.equal(state[0], torch.zeros(24, dtype=torch.float64))
    assert_within(state[1], values.square().sum((0, 2)), 2**-48 * values.square().sum((0, 2)))
    stats = torch.zeros(5, 24, dtype=acc_of(dtype))
    stats[0], stats[2], stats[3], stats[4] = 1, 2, 3, -1  # mean, invstd, scale, shift
    ints = torch.randint(-3, 4, (4, 24, 64), generator=generator).double()
    grad = Activation(ints, dtype, layout)
    sums = reduce_backward(grad, AFFINE, 0, y, stats)
    g = ints * (3 * values - 1 > 0)
    assert torch.equal(sums[0], g.sum((0, 2)))
    assert torch.equal(sums[1], (g * (values - 1)).sum((0, 2)) * 2)
    out = Activation.empty_like(y)
    scale_shift_act(y, stats, out, grad)
    assert torch.equal(out.truth, relu(3 * values - 1 + ints))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(isa, layout):
    y = Activation(torch.empty(0, 5, 49), torch.float32, layout)
    assert torch.equal(channel_stats(y), torch.zeros(2, 5, dtype=torch.float64))
    prior = torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(channel_stats(y, state=prior.clone(), prior_count=3), prior)
    stats = finalize(torch.zeros(2, 5, dtype=torch.float64), 0, 5, torch.float32)
    assert torch.equal(stats[:2], torch.zeros(2, 5))
    assert torch.equal(reduce_backward(y, NONE, 0, y, stats)[:2], torch.zeros(2, 5).double())
    scale_shift_act(y, stats, y)
    apply_backward(y, NONE, 0, y, stats, torch.zeros(3, 5).double(), 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_give_the_whole(isa, dtype, layout):
    y = Activation.random((5, 100, 49), dtype, layout, mean=10)
    grad = Activation.random((5, 100, 49), dtype, layout, seed=1)
    whole, count = channel_stats(y), 5 * 49
    state, prior = None, 0
    stats = stats_of(y)
    sums = reduce_backward(grad, AFFINE, 0, y, stats)
    chunked_sums = torch.full_like(sums, torch.nan)
    grad_whole, grad_chunked = Activation.empty_like(y), Activation.empty_like(y)
    parts = [slice(0, 2), slice(2, 3), slice(3, 5)]
    for i, part in enumerate(parts):
        piece = Activation(y.truth[part], dtype, layout)
        state = channel_stats(piece, state=state, prior_count=prior)
        prior += piece.n * piece.hw
        piece_grad = Activation(grad.truth[part], dtype, layout)
        reduce_backward(piece_grad, AFFINE, 0, piece, stats, sums=chunked_sums, accumulate=i > 0)
    # Both sides see the same values through other shifts and blocks: twice one side's bound.
    u, std = u_of(acc_of(dtype)), (whole[1] / count).sqrt()
    assert_within(state[0], whole[0], 2 * (8 * u * 3 * std + 2**-48 * 20))
    assert_within(state[1], whole[1], 2 * 50 * u * whole[1])
    spread = (grad.truth * (y.truth - column(stats[0]))).abs().sum((0, 2)) * stats[2].double()
    assert_within(chunked_sums[1], sums[1], 2 * 9 * u * spread)
    apply_backward(grad, AFFINE, 0, y, stats, sums, count, grad_y1=grad_whole)
    for part in parts:
        piece = Activation(y.truth[part], dtype, layout)
        result = Activation.empty_like(piece)
        piece_grad = Activation(grad.truth[part], dtype, layout)
        apply_backward(piece_grad, AFFINE, 0, piece, stats, sums, count, grad_y1=result)
        grad_chunked.memory[part] = result.memory
    assert torch.equal(grad_chunked.memory, grad_whole.memory)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finalize_stats(dtype):
    c, count = 17, 12
    weight, bias = parameters(c, dtype, 0)
    state = torch.rand(2, c, dtype=torch.float64) + 0.5
    u = u_of(acc_of(dtype))
    for w, b in itertools.product((weight, None), (bias, None)):
        stats = finalize(state, count, c, dtype, w, b)
        mean, var = state[0], state[1] / count
        invstd = 1 / (var + EPS).sqrt()
        scale = invstd * (1 if w is None else w.double())
        shift = (0 if b is None else b.double()) - mean * scale
        # Computed in float64 (a few of its roundings), stored with one rounding.
        for row, expected in zip(stats, (mean, var, invstd, scale, shift), strict=True):
            assert_within(row, expected, u * expected.abs() + 8 * 2**-53 * (1 + expected.abs()))
    running = torch.rand(2, c).to(acc_of(dtype))
    stats = torch.empty(5, c, dtype=acc_of(dtype))
    _cpu.finalize_stats(0, 0, running[0].data_ptr(), running[1].data_ptr(), 0, 0, EPS,
                        stats.data_ptr(), c, DTYPES.index(dtype))  # fmt: skip
    assert torch.equal(stats[:2], running)
    assert torch.equal(stats[2], stats[3])


# ---- forward ----


def scale_shift_act(y, stats, out, residual=None, residual_stats=None, mask=None, act=1,
                    threads=2):  # fmt: skip
    residual_pointers = [0, 0]
    if residual_stats is not None:
        residual_pointers = [residual_stats[3].data_ptr(), residual_stats[4].data_ptr()]
    _cpu.scale_shift_act(
        y.ptr, stats[3].data_ptr(), stats[4].data_ptr(), residual.ptr if residual else 0,
        *residual_pointers, out.ptr, 0 if mask is None else mask.data_ptr(), act,
        **y.sizes(threads),
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_shift_act(isa, dtype, layout):
    u = u_of(acc_of(dtype))
    cases = itertools.product(SHAPES, ("none", "plain", "affine"), (0, 1), (False, True))
    for shape, kind, act, with_mask in cases:
        y = Activation.random(shape, dtype, layout)
        r = Activation.random(shape, dtype, layout, seed=1)
        stats, residual_stats = stats_of(y), stats_of(r, seed=8)
        out, mask = Activation.empty_like(y), y.empty_mask() if with_mask else None
        scale_shift_act(y, stats, out, r if kind != "none" else None,
                        residual_stats if kind == "affine" else None, mask, act)  # fmt: skip
        terms = [y.truth * column(stats[3]), column(stats[4])]
        if kind == "plain":
            terms += [r.truth]
        elif kind == "affine":
            terms += [r.truth * column(residual_stats[3]), column(residual_stats[4])]
        total = sum(terms)
        expected = relu(total) if act else total
        # Two products and three sums, each one rounding at most.
        bound = 5 * u * sum(t.abs() for t in terms) + storage_bound(total, dtype)
        assert_within(out.stored, expected, bound)
        if with_mask:
            expected_bits = ~(out.truth <= 0) if act else torch.ones_like(total, dtype=torch.bool)
            assert torch.equal(y.mask_bits(mask), expected_bits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_may_alias_inputs(isa, dtype, layout):
    shape = (5, 100, 49)
    for target in ("y", "residual"):
        y = Activation.random(shape, dtype, layout)
        r = Activation.random(shape, dtype, layout, seed=1)
        stats, residual_stats = stats_of(y), stats_of(r, seed=8)
        out = Activation.empty_like(y)
        scale_shift_act(y, stats, out, r, residual_stats)
        alias = y if target == "y" else r
        scale_shift_act(y, stats, alias, r, residual_stats)
        assert torch.equal(alias.memory, out.memory)
    y = Activation.random(shape, dtype, layout)
    stats, sums = stats_of(y), torch.randn(3, 100, dtype=torch.float64)
    for target in ("grad_y1", "grad_y2", "grad_residual"):
        grad = Activation.random(shape, dtype, layout, seed=2)
        outputs = {k: Activation.empty_like(y) for k in ("grad_y1", "grad_y2", "grad_residual")}
        apply_backward(grad, AFFINE, 0, y, stats, sums, 245, y2=y, stats2=stats, **outputs)
        aliased = {**{k: Activation.empty_like(y) for k in outputs}, target: grad}
        apply_backward(grad, AFFINE, 0, y, stats, sums, 245, y2=y, stats2=stats, **aliased)
        for name in outputs:
            assert torch.equal(aliased[name].memory, outputs[name].memory)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_pass_through_relu(isa, dtype, layout):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, -1.0, 2.0, tiny, -tiny])
    y = Activation(special.repeat(2, 3).reshape(2, 3, 9), dtype, layout)
    zero = Activation(torch.full((2, 3, 9), -0.0), dtype, layout)
    out, mask = Activation.empty_like(y), y.empty_mask()
    _cpu.add_act(y.ptr, zero.ptr, out.ptr, mask.data_ptr(), 1, **y.sizes())
    expected = torch.relu(y.stored)
    assert torch.equal(out.stored.isnan(), expected.isnan())
    keep = ~expected.isnan()
    assert torch.equal(out.stored[keep], expected[keep])
    assert torch.equal(out.stored[keep].signbit(), expected[keep].signbit())
    assert torch.equal(y.mask_bits(mask), ~(expected <= 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_act_and_its_backward(isa, dtype, layout):
    for shape, act in itertools.product(SHAPES, (0, 1)):
        x = Activation.random(shape, dtype, layout)
        r = Activation.random(shape, dtype, layout, seed=1)
        grad = Activation.random(shape, dtype, layout, seed=2)
        out, mask = Activation.empty_like(x), x.empty_mask()
        _cpu.add_act(x.ptr, r.ptr, out.ptr, mask.data_ptr(), act, **x.sizes())
        # torch adds in float32 and rounds once, and so does the kernel.
        total = x.stored + r.stored
        assert torch.equal(out.stored, torch.relu(total) if act else total)
        bits = x.mask_bits(mask)
        assert torch.equal(bits, ~(out.stored <= 0) if act else torch.ones_like(bits))
        _cpu.add_act(x.ptr, r.ptr, r.ptr, 0, act, **x.sizes())
        assert torch.equal(r.memory, out.memory)
        for gate, source in [(NONE, 0), (MASK, mask.data_ptr()), (OUTPUT, out.ptr)]:
            result = Activation.empty_like(x)
            _cpu.act_backward(grad.ptr, gate, source, result.ptr, **x.sizes())
            kept = ~(out.stored <= 0) if gate == OUTPUT else bits
            expected = grad.stored if gate == NONE else torch.where(kept, grad.stored, 0.0)
            assert torch.equal(result.stored, expected)
        _cpu.act_backward(grad.ptr, OUTPUT, out.ptr, grad.ptr, **x.sizes())
        assert torch.equal(grad.memory, result.memory)


def every_value(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives(isa, dtype):
    values = every_value(dtype)
    x = Activation(torch.zeros(1, 1, values.numel()), dtype, 1)
    x.memory.view(-1).copy_(values)
    zero = Activation(torch.full((1, 1, values.numel()), -0.0), dtype, 1)
    out = Activation.empty_like(x)
    _cpu.add_act(x.ptr, zero.ptr, out.ptr, 0, 0, **x.sizes())
    nan = values.isnan()
    assert torch.equal(out.memory.view(-1)[~nan].view(torch.int16), values[~nan].view(torch.int16))
    assert out.memory.view(-1)[nan].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_torchs(isa, dtype):
    # All neighbourhoods of rounding boundaries: every value times a factor near 1, by the scale.
    values = every_value(dtype)
    values = values[values.isfinite()]
    x = Activation(torch.zeros(1, 1, values.numel()), dtype, 1)
    x.memory.view(-1).copy_(values)
    out, mask = Activation.empty_like(x), x.empty_mask()
    shift = torch.full((1,), -0.0)
    for factor in (1 + 2**-9, 1 + 2**-12, 1 - 2**-10, 0.5, 1.5, 0.33, 7.7, 2.0**-20):
        scale = torch.full((1,), factor)
        _cpu.scale_shift_act(x.ptr, scale.data_ptr(), shift.data_ptr(), 0, 0, 0, out.ptr,
                             mask.data_ptr(), 1, **x.sizes())  # fmt: skip
        expected = torch.relu(values.float() * scale).to(dtype)
        assert torch.equal(out.memory.view(-1), expected)
        assert torch.equal(x.mask_bits(mask).reshape(-1), expected > 0)
        grad = Activation(torch.ones(1, 1, values.numel()), dtype, 1)
        stats = torch.stack([shift, shift, shift, scale, shift])
        sums = reduce_backward(grad, AFFINE, 0, x, stats)
        assert sums[0].item() == (expected > 0).sum()


# ---- backward ----


def reduce_backward(grad, gate, source, y1=None, stats1=None, y2=None, stats2=None, sums=None,
                    accumulate=False, threads=2):  # fmt: skip
    sums = torch.full((3, grad.c), torch.nan, dtype=torch.float64) if sums is None else sums
    _cpu.bn_act_backward_reduce(
        grad.ptr, gate, source, y1.ptr if y1 else 0, 0 if stats1 is None else stats1.data_ptr(),
        y2.ptr if y2 else 0, 0 if stats2 is None else stats2.data_ptr(), sums.data_ptr(),
        accumulate, **grad.sizes(threads),
    )  # fmt: skip
    return sums


def apply_backward(grad, gate, source, y1, stats1, sums, count, y2=None, stats2=None,
                   grad_y1=None, grad_y2=None, grad_residual=None, threads=2):  # fmt: skip
    _cpu.bn_act_backward_apply(
        grad.ptr, gate, source, y1.ptr if y1 else 0, 0 if stats1 is None else stats1.data_ptr(),
        y2.ptr if y2 else 0, 0 if stats2 is None else stats2.data_ptr(), sums.data_ptr(), count,
        *(t.ptr if t else 0 for t in (grad_y1, grad_y2, grad_residual)), **grad.sizes(threads),
    )  # fmt: skip


def backward_case(shape, dtype, layout, gate):
    """grad_out, both branches and their stats, the gate's source, and the gated gradient."""
    grad = Activation.random(shape, dtype, layout, seed=2)
    y1 = Activation.random(shape, dtype, layout, mean=1)
    y2 = Activation.random(shape, dtype, layout, seed=1, mean=-2, std=3)
    stats1, stats2 = stats_of(y1), stats_of(y2, seed=8)
    out, mask = Activation.empty_like(y1), y1.empty_mask()
    scale_shift_act(y1, stats1, out, mask=mask)
    source = {NONE: 0, MASK: mask.data_ptr(), AFFINE: 0, OUTPUT: out.ptr}[gate]
    g = grad.truth if gate == NONE else torch.where(out.truth <= 0, 0.0, grad.truth)
    return grad, y1, y2, stats1, stats2, (source, out, mask), g


@pytest.mark.parametrize("gate", [NONE, MASK, AFFINE, OUTPUT])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(isa, dtype, layout, gate):
    u = u_of(acc_of(dtype))
    for shape in SHAPES:
        grad, y1, y2, stats1, stats2, (source, *_), g = backward_case(shape, dtype, layout, gate)
        sums = reduce_backward(grad, gate, source, y1, stats1, y2, stats2)
        # Sums of eight float terms (7 roundings), joined in float64.
        assert_within(sums[0], g.sum((0, 2)), 8 * u * g.abs().sum((0, 2)))
        for row, y, stats in ((1, y1, stats1), (2, y2, stats2)):
            term = g * (y.truth - column(stats[0])) * column(stats[2])
            # One more rounding each for y - mean and for the product.
            assert_within(sums[row], term.sum((0, 2)), 10 * u * term.abs().sum((0, 2)))
        single = reduce_backward(grad, gate, source, y1, stats1)
        assert torch.equal(single[:2], sums[:2]) and single[2].isnan().all()
        if gate != AFFINE:
            assert torch.equal(reduce_backward(grad, gate, source)[0], sums[0])
        again = reduce_backward(grad, gate, source, y1, stats1, y2, stats2, sums.clone(), True)
        assert torch.equal(again, 2 * sums)
        for count in (0, grad.n * grad.hw + 5):
            outputs = {k: Activation.empty_like(y1) for k in ("grad_y1", "grad_y2")}
            residual = Activation.empty_like(y1)
            apply_backward(grad, gate, source, y1, stats1, sums, count, y2, stats2, **outputs,
                           grad_residual=residual)  # fmt: skip
            assert torch.equal(residual.truth, g)
            branches = zip(outputs.values(), (y1, y2), (stats1, stats2), sums[1:], strict=True)
            for result, y, stats, sum_gx in branches:
                a = column(stats[3])
                b, c = torch.zeros_like(a), torch.zeros_like(a)
                if count:
                    b = -a * column(stats[2]) * column(sum_gx) / count
                    c = -a * column(sums[0]) / count - b * column(stats[0])
                expected = a * g + b * y.truth + c
                # A rounding for each coefficient, and two multiply-adds of at most two each.
                terms = (a * g).abs() + (b * y.truth).abs() + c.abs()
                bound = 5 * u * terms + storage_bound(expected, dtype)
                assert_within(result.stored, expected, bound)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unwanted_outputs_and_unread_inputs(isa, layout):
    shape, dtype = (5, 17, 49), torch.float32
    grad, y1, y2, stats1, stats2, (source, *_), g = backward_case(shape, dtype, layout, MASK)
    sums = reduce_backward(grad, MASK, source, y1, stats1, y2, stats2)
    names = ("grad_y1", "grad_y2", "grad_residual")
    full = {k: Activation.empty_like(y1) for k in names}
    apply_backward(grad, MASK, source, y1, stats1, sums, 245, y2, stats2, **full)
    for wanted in itertools.product((False, True), repeat=3):
        some = {k: Activation.empty_like(y1) for k, want in zip(names, wanted, strict=True) if want}
        apply_backward(grad, MASK, source, y1, stats1, sums, 245, y2, stats2, **some)
        for name, result in some.items():
            assert torch.equal(result.memory, full[name].memory)
    frozen = Activation.empty_like(y1)
    apply_backward(grad, MASK, source, None, stats1, sums, 0, grad_y1=frozen)
    assert_within(frozen.stored, column(stats1[3]) * g, storage_bound(frozen.truth, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(isa, dtype, layout):
    # Large enough that three threads all find work.
    shape = (5, 100, 1024)
    results = []
    for threads in (1, 2, 3):
        y = Activation.random(shape, dtype, layout, mean=3)
        grad = Activation.random(shape, dtype, layout, seed=2)
        state = channel_stats(y, threads)
        stats = finalize(state, 5 * 1024, 100, dtype)
        out, mask, result = Activation.empty_like(y), y.empty_mask(), Activation.empty_like(y)
        scale_shift_act(y, stats, out, grad, stats, mask, threads=threads)
        sums = reduce_backward(grad, MASK, mask.data_ptr(), y, stats, out, stats, threads=threads)
        apply_backward(grad, MASK, mask.data_ptr(), y, stats, sums, 5 * 1024, grad_y1=result,
                       threads=threads)  # fmt: skip
        added = Activation.empty_like(y)
        _cpu.add_act(y.ptr, grad.ptr, added.ptr, 0, 1, **y.sizes(threads))
        results.append([state, stats, out.memory, mask, sums, result.memory, added.memory])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- arguments ----


def test_bad_codes_sizes_and_pointers_raise():
    y, state = torch.zeros(8), torch.zeros(2, 2, dtype=torch.float64)
    sizes = {"n": 1, "c": 2, "hw": 4, "layout": 0, "dtype": 0, "threads": 1}
    good = {"y": y.data_ptr(), "state": state.data_ptr(), "prior_count": 0, **sizes}
    _cpu.channel_stats(**good)
    for name, value in [("y", 0), ("state", 0), ("prior_count", -1), ("n", -1), ("c", -1),
                        ("hw", -1), ("layout", 2), ("dtype", 4), ("dtype", -1),
                        ("threads", 0)]:  # fmt: skip
        with pytest.raises(ValueError, match=name):
            _cpu.channel_stats(**{**good, name: value})
    with pytest.raises(ValueError, match="gate must be 0, 1 or 3, got 2"):
        _cpu.act_backward(y.data_ptr(), AFFINE, 0, y.data_ptr(), **sizes)
    with pytest.raises(ValueError, match="gate_ptr"):
        _cpu.act_backward(y.data_ptr(), MASK, 0, y.data_ptr(), **sizes)
    with pytest.raises(ValueError, match="act must be between 0 and 7, got 8"):
        _cpu.add_act(y.data_ptr(), y.data_ptr(), y.data_ptr(), 0, 8, **sizes)


def run_python(code, **environment):
    return subprocess.run([sys.executable, "-c", "import torch\n" + code], text=True,
                          env={**os.environ, **environment}, capture_output=True)  # fmt: skip


def test_isa_is_chosen_by_environment():
    assert _cpu.isas()[-1] == "baseline" and _cpu.isa() in _cpu.isas()
    for name in _cpu.isas():
        result = run_python("from fastres import _cpu; print(_cpu.isa())", FASTRES_CPU_ISA=name)
        assert result.stdout.strip() == name, result.stderr
    result = run_python("from fastres import _cpu", FASTRES_CPU_ISA="sparc")
    assert "ImportError: FASTRES_CPU_ISA: isa must be one that was built" in result.stderr
    with pytest.raises(ValueError, match="got sparc"):
        _cpu.set_isa("sparc")


def test_the_process_has_one_openmp_runtime():
    info = _cpu.openmp()
    assert info["version"] >= 201511
    if "OpenMP 2" not in torch.__config__.parallel_info():
        return  # torch brings no OpenMP of its own
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line}
    assert info["library"] in loaded
    assert os.path.dirname(torch.__file__) in info["library"] or len(loaded) == 1


# ---- allocator ----


@pytest.fixture
def allocator():
    _cpu.trim()
    yield
    _cpu.set_poison(os.environ.get("FASTRES_POISON", "0") not in ("", "0"))
    _cpu.set_cache_limit(2**62)
    _cpu.trim()


def new_tensor(shape, strides=None, code=0):
    if strides is None:
        strides = list(torch.empty(shape, device="meta").stride())
    return torch.utils.dlpack.from_dlpack(_cpu.empty(list(shape), list(strides), code))


@pytest.mark.parametrize("code", range(5))
def test_capsules_become_tensors(allocator, code):
    dtype = [*DTYPES, torch.uint8][code]
    shape = (2, 3, 5, 7)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        like = torch.empty(shape, dtype=dtype).to(memory_format=memory_format)
        t = new_tensor(shape, like.stride(), code)
        assert t.dtype == dtype and t.shape == shape and t.stride() == like.stride()
        t.fill_(3)
        assert torch.equal(t, torch.full(shape, 3, dtype=dtype))
    for empty_shape in [(0,), (2, 0, 3)]:
        assert new_tensor(empty_shape, code=code).shape == empty_shape
    assert new_tensor((), code=code).shape == ()


def test_blocks_are_reused(allocator):
    peak = new_tensor((4_000_000,))  # the cache may keep as much as was live at once
    del peak
    _cpu.trim()
    for numel in (10, 100_000, 3_000_000):
        large = numel * 4 >= 2**20
        before = _cpu.memory_stats()
        t = new_tensor((numel,))
        address = t.data_ptr()
        assert address % (2**21 if numel * 4 >= 2**20 else 64) == 0
        live = _cpu.memory_stats()["live"] - before["live"]
        assert numel * 4 <= live <= numel * 4 * 9 / 8 + 2**21
        del t
        assert _cpu.memory_stats()["live"] == before["live"]
        if large:  # smaller blocks are malloc's, which keeps them itself
            assert _cpu.memory_stats()["cached"] == before["cached"] + live
            assert new_tensor((numel,)).data_ptr() == address
            after = _cpu.memory_stats()
            assert (after["hits"], after["misses"]) == (before["hits"] + 1, before["misses"] + 1)


def test_an_unused_capsule_frees_its_memory(allocator):
    before = _cpu.memory_stats()["live"]
    capsule = _cpu.empty([1000], [1], 0)
    assert _cpu.memory_stats()["live"] > before
    del capsule
    assert _cpu.memory_stats()["live"] == before


def test_trim_and_cache_limit(allocator):
    tensors = [new_tensor((2**20,)) for _ in range(4)]
    del tensors
    assert _cpu.memory_stats()["cached"] == 4 * 2**22
    _cpu.set_cache_limit(2 * 2**22)
    assert _cpu.memory_stats()["cached"] == 2 * 2**22
    _cpu.trim()
    assert _cpu.memory_stats()["cached"] == 0
    tensors = [new_tensor((2**20,)) for _ in range(4)]
    del tensors
    assert _cpu.memory_stats()["cached"] == 2 * 2**22


def test_neighbours_that_are_free_serve_a_larger_request(allocator):
    """What is kept does not depend on the mixture of sizes that came and went."""
    pieces = [new_tensor((2**20,)) for _ in range(4)]
    lowest = min(t.data_ptr() for t in pieces)
    del pieces
    misses = _cpu.memory_stats()["misses"]
    whole = new_tensor((2**22,))
    assert whole.data_ptr() == lowest
    assert _cpu.memory_stats()["misses"] == misses


def test_a_steady_step_maps_no_new_memory(allocator):
    """A training step allocates and frees the same mixture of sizes again and again."""

    def step():
        kept = [new_tensor((2**20 * k,)) for k in (3, 1, 4, 1, 5)]
        temporary = new_tensor((2**20 * 9,))
        del temporary
        for size in (2, 6, 5):
            kept.pop(0)
            kept.append(new_tensor((2**20 * size,)))

    step()
    step()
    before = _cpu.memory_stats()["misses"]
    for _ in range(5):
        step()
    assert _cpu.memory_stats()["misses"] == before


def test_the_cache_never_outgrows_the_peak(allocator):
    code = """
from fastres import _cpu
def cycle(numel):
    for _ in range(3):
        t = torch.utils.dlpack.from_dlpack(_cpu.empty([numel], [1], 0))
        del t
        s = _cpu.memory_stats()
        assert s["cached"] <= s["peak_live"], s
for numel in (2**20, 2**21, 3 * 2**20, 2**20, 7 * 2**19, 2**22):
    cycle(numel)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_poison(allocator):
    _cpu.set_poison(True)
    for code in range(4):
        assert new_tensor((1001,), code=code).isnan().all()
    t = new_tensor((300_000,))
    t.zero_()
    del t
    assert new_tensor((300_000,)).isnan().all()
    code = "from fastres import _cpu\nt = torch.utils.dlpack.from_dlpack(_cpu.empty([5], [1], 0))"
    result = run_python(code + "\nassert t.isnan().all()", FASTRES_POISON="1")
    assert result.returncode == 0, result.stderr


def test_scratch_memory_is_never_read_unwritten(isa, allocator):
    _cpu.set_poison(True)
    for layout in LAYOUTS:
        y = Activation.random((5, 530, 300), torch.float32, layout)
        check_stats(channel_stats(y), y)
        assert reduce_backward(y, NONE, 0, y, stats_of(y))[:2].isfinite().all()


def test_allocation_failures_raise(allocator):
    for shape in ([2**60], [2**62], [2**40, 2**40]):
        with pytest.raises(MemoryError):
            _cpu.empty(shape, [1] * len(shape), 0)
    with pytest.raises(ValueError, match="shape must be non-negative, got -1"):
        _cpu.empty([-1], [1], 0)
    with pytest.raises(ValueError, match="dtype_code"):
        _cpu.empty([1], [1], 5)
    with pytest.raises(ValueError, match="strides"):
        _cpu.empty([1, 1], [1], 0)


def test_cache_limit_from_environment():
    code = """
from fastres import _cpu
t = torch.utils.dlpack.from_dlpack(_cpu.empty([2**22], [1], 0))
del t
assert _cpu.memory_stats()["cached"] <= 8 * 2**20
"""
    result = run_python(code, FASTRES_CPU_CACHE_MB="8")
    assert result.returncode == 0, result.stderr


def test_many_threads_allocate_and_free(allocator):
    before = _cpu.memory_stats()["live"]
    failures = []

    def work(seed):
        kept = []
        for i in range(200):
            t = new_tensor(((seed * 7919 + i * 104729) % 50_000 + 1,))
            t.fill_(seed)
            kept.append(t)
            if len(kept) > 5:
                oldest = kept.pop(0)
                if not bool((oldest == seed).all()):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert _cpu.memory_stats()["live"] == before


def test_a_forked_child_allocates(allocator):
    code = """
import os, threading
from fastres import _cpu
stop = False
def churn():
    while not stop:
        _cpu.empty([1000], [1], 0)
thread = threading.Thread(target=churn)
thread.start()
for _ in range(50):
    child = os.fork()
    if child == 0:
        _cpu.empty([1000], [1], 0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop = True
thread.join()
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", "import torch\n" + code],
                            capture_output=True, text=True, timeout=60)  # fmt: skip
    assert result.returncode == 0, result.stderr
