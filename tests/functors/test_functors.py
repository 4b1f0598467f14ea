"""The functors that host and device share: conversions, relu and its gate, coefficients.

Truth is torch's own conversions, and ``Fraction``; u is 2^-53.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import inf, nan

import numpy as np
import pytest
import torch
from functors.program import (
    CODES,
    HALVES,
    MORE,
    U64,
    Array,
    bits,
    exact,
    floats_of,
    needs_compiler,
    run,
)
from numpy.typing import NDArray
from torch import Tensor

pytestmark = needs_compiler


# ---------------------------------------------------------------- dtype.h


def all_values(dtype: torch.dtype) -> Tensor:
    return torch.arange(2**16).to(torch.uint16).view(dtype)


def converted(values: Array, dtype: torch.dtype) -> Tensor:
    """``FromAcc<dtype>`` of float32 values."""
    assert values.dtype == np.float32
    raw = run("from_acc", CODES[dtype], rows=values)
    return torch.frombuffer(bytearray(raw), dtype=dtype)


def neighbours(dtype: torch.dtype) -> tuple[Array, Array]:
    """All non-negative finite values as float64, each with the next one, in ascending order.

    After the largest comes what would, were there one more exponent: where infinity begins.
    """
    ascending = all_values(dtype)[: 2**15].double()
    values = ascending[ascending.isfinite()].numpy()
    return values, np.append(values[1:], 2 * values[-1] - values[-2])


def random_floats(count: int = 1 << 20) -> NDArray[np.float32]:
    """Random bit patterns: all magnitudes, subnormals, infinities and NaN among them."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_to_acc_is_torch_s_for_every_bit_pattern(dtype: torch.dtype) -> None:
    values = all_values(dtype)
    got = np.frombuffer(run("to_acc", CODES[dtype], rows=bits(values)), np.float32)
    want = values.float().numpy()
    number = ~np.isnan(want)
    assert number.sum() >= 2**16 - 2 * 1023
    assert np.array_equal(got[number].view(np.uint32), want[number].view(np.uint32))
    assert np.isnan(got[~number]).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_from_acc_keeps_every_16_bit_value(dtype: torch.dtype) -> None:
    values = all_values(dtype)
    got = converted(values.float().numpy(), dtype)
    number = ~values.isnan()
    assert np.array_equal(bits(got[number]), bits(values[number]))
    quiet = 0x40 if dtype == torch.bfloat16 else 0x200
    assert got[~number].isnan().all()
    assert (bits(got[~number]) & quiet).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sign", [1, -1])
def test_from_acc_rounds_to_nearest_and_ties_to_even(dtype: torch.dtype, sign: int) -> None:
    below, above = neighbours(dtype)
    middle = (sign * (below + above) / 2).astype(np.float32)
    assert np.array_equal(2 * middle.astype(np.float64), sign * (below + above)), "not midpoints"
    lower = np.arange(len(below)) + (0 if sign > 0 else 0x8000)
    away, back = np.float32(sign * inf), np.float32(0)
    assert np.array_equal(bits(converted(np.nextafter(middle, back), dtype)), lower)
    assert np.array_equal(bits(converted(middle, dtype)), lower + lower % 2)
    assert np.array_equal(bits(converted(np.nextafter(middle, away), dtype)), lower + 1)


@pytest.mark.parametrize("dtype", HALVES)
def test_from_acc_is_torch_s_for_random_bit_patterns(dtype: torch.dtype) -> None:
    values = random_floats()
    got, want = converted(values, dtype), torch.from_numpy(values).to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert np.array_equal(bits(got[number]), bits(want[number]))


@pytest.mark.parametrize("dtype", CODES)
def test_bound_is_the_largest_value_that_rounds_to_zero(dtype: torch.dtype) -> None:
    acc = np.float64 if dtype == torch.float64 else np.float32
    bound = np.frombuffer(run("bound", CODES[dtype]), acc)
    around = torch.from_numpy(np.concatenate([bound, np.nextafter(bound, acc(inf))])).to(dtype)
    assert around[0] == 0
    assert around[1] > 0


# ---------------------------------------------------------------- activation.h


def values_around_zero() -> NDArray[np.float32]:
    """Both signs of zero, subnormals, what rounds to zero and what hardly does not, NaN, inf."""
    small = [neighbours(dtype) for dtype in HALVES]
    middle = np.concatenate([(below + above)[:2000] / 2 for below, above in small])
    around = np.concatenate([b[:2000] for b, _ in small] + [middle]).astype(np.float32)
    steps = [around, np.nextafter(around, np.float32(inf)), np.nextafter(around, np.float32(-inf))]
    special = np.array([0.0, 1.0, inf, nan, np.finfo(np.float32).tiny, 1e-45], np.float32)
    positive = np.concatenate([*steps, special])
    return np.concatenate([positive, -positive, random_floats(4096)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relu_is_torch_s(dtype: torch.dtype) -> None:
    values = torch.from_numpy(values_around_zero()).to(dtype)
    got = torch.frombuffer(bytearray(run("relu", CODES[dtype], rows=values.numpy())), dtype=dtype)
    want = torch.relu(values)
    assert torch.equal(got.isnan(), values.isnan())
    number = ~values.isnan()
    assert torch.equal(got[number], want[number])
    assert torch.equal(got[number].signbit(), want[number].signbit())
    negative_zero = (values == 0) & values.signbit()
    assert got[negative_zero].signbit().all() and negative_zero.any()


@pytest.mark.parametrize("dtype", CODES)
def test_relu_gate_asks_about_the_stored_value(dtype: torch.dtype) -> None:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.from_numpy(values_around_zero()).to(acc)
    got = np.frombuffer(run("gate", CODES[dtype], rows=values.numpy()), np.bool_)
    want = ~(values.to(dtype) <= 0).numpy()
    assert np.array_equal(got, want)
    assert 0.1 < want.mean() < 0.9
    assert got[values.isnan().numpy()].all()


# ---------------------------------------------------------------- batch_norm.h


MEANS = [0.0, -0.3, 1e4, 1e8]
WEIGHTS = [1.0, -0.7, 0.0, 3e-3]


def test_forward_coefficients() -> None:
    """invstd takes three roundings, one of them under the root; scale one more, shift two."""
    variances = [0.0, 1e-12, 1.0, 1e6]
    grid = itertools.product(MEANS, variances, WEIGHTS, [0.0, 0.25, -7.0], [1e-5, 1e-3, 1.0])
    rows = np.array(list(grid))
    got = floats_of("forward", rows=rows, columns=3)
    for row, out in zip(rows, got, strict=True):
        (mean, var, weight, bias, eps), (invstd, scale, shift) = exact(row), exact(out)
        assert abs(invstd**2 * (var + eps) - 1) <= MORE * 5 * U64 and invstd > 0
        assert abs(scale - weight * invstd) <= U64 * abs(weight * invstd)
        rounded = abs(mean * scale) + abs(bias - mean * scale)
        assert abs(shift - (bias - mean * scale)) <= Fraction(MORE * U64) * rounded


def test_backward_coefficients() -> None:
    """b takes three roundings; c two in its first term, one in its second, one in all."""
    sums = [0.0, -2.5, 1e5]
    rows = np.array(list(itertools.product(MEANS, [1.3, 300.0], WEIGHTS, sums, sums, [1, 7, 1e9])))
    got = floats_of("backward", rows=rows, columns=3)
    more = Fraction(MORE * U64)
    for row, out in zip(rows, got, strict=True):
        (mean, invstd, scale, sum_g, sum_gx, count), (a, b, c) = exact(row), exact(out)
        assert a == scale
        want_b = -scale * invstd * sum_gx / count
        assert abs(b - want_b) <= 3 * more * abs(want_b)
        first, want_c = -scale * sum_g / count, -scale * sum_g / count - b * mean
        assert abs(c - want_c) <= more * (2 * abs(first) + abs(b * mean) + abs(want_c))


def test_backward_coefficients_of_running_statistics() -> None:
    sums = [0.0, -2.5, nan, inf]
    rows = np.array(list(itertools.product([1.0, nan], [0.5], WEIGHTS, sums, sums, [0.0])))
    got = floats_of("backward", rows=rows, columns=3)
    assert np.array_equal(got[:, 0], rows[:, 2])
    assert (got[:, 1:].view(np.uint64) == 0).all()
