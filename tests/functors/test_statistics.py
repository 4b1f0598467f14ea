"""How means and squared deviations are computed and joined, against ``Fraction``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import inf, nan, sqrt

import numpy as np
import pytest
import torch
from functors.program import (
    CODES,
    HALVES,
    MORE,
    U32,
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


def statistics_of(channels: int) -> np.dtype[np.void]:
    """Statistics<channels> in memory."""
    vector = (np.float64, (channels,))
    return np.dtype([("mean", vector), ("m2", vector), ("count", np.float32)], align=True)


def truth(values: Iterable[float]) -> tuple[Fraction, Fraction]:
    """Mean and sum of squared deviations."""
    numbers = exact(values)
    mean = sum(numbers, Fraction()) / len(numbers)
    return mean, sum(((v - mean) ** 2 for v in numbers), Fraction())


def value_sets(count: int) -> dict[str, NDArray[np.float64]]:
    """Values of float32, by what is hard about them."""
    normal = np.random.default_rng(count).standard_normal(count)
    outlier, first = normal.copy(), normal.copy()
    outlier[count // 2], first[0] = 1e6, 1e6
    sets = {
        "normal": normal,
        "mean 1e4": normal + 1e4,
        "mean 1e8": 16 * normal + 1e8,
        "constant": np.full(count, 0.1),
        "outlier": outlier,
        "outlier first": first,
        "tiny": normal * 1e-15,
        "integers": np.round(4 * normal),
    }
    return {name: v.astype(np.float32).astype(np.float64) for name, v in sets.items()}


# ---------------------------------------------------------------- two sets of values, and many

ORDERS = ["one by one", "last first", "pairwise"]


def order_of(name: str, count: int) -> tuple[list[int], int]:
    """In which states are joined, as a postfix expression, and its depth."""

    def balanced(size: int) -> list[int]:
        return [0] if size == 1 else [*balanced(size // 2), *balanced(size - size // 2), 1]

    if name == "pairwise":
        return balanced(count), (count - 1).bit_length()
    one_by_one, last_first = [0, *[0, 1] * (count - 1)], [0] * count + [1] * (count - 1)
    return (one_by_one if name == "one by one" else last_first), count - 1


def joined(command: str, states: Array, postfix: Sequence[int]) -> NDArray[np.float64]:
    """(count, mean, M2) of sets of such states [sets, states, 3], joined in the order given."""
    if command == "merge":
        return floats_of("merge", *postfix, rows=states, columns=3)
    rows = np.zeros(states.shape[:-1], statistics_of(2))
    # What happens to a channel is the same whatever is beside it.
    rows["mean"] = np.stack([states[..., 1], np.full(states.shape[:-1], nan)], -1)
    rows["m2"] = np.stack([states[..., 2], np.full(states.shape[:-1], inf)], -1)
    rows["count"] = states[..., 0]
    out = np.frombuffer(run("join", *postfix, rows=rows), rows.dtype)
    return np.stack([out["count"], out["mean"][:, 0], out["m2"][:, 0]], -1)


def check_joined(got: Array, states: Array, depth: int, share_error: float) -> None:
    """Of one set of states; the relative error of n_b / n is its caller's to know.

    A join's mean is off by ``share_error + 2u`` of delta, which is at most the means' range, and by
    u of itself; what its sides are off by is averaged. So e = depth * (range * (share_error + 2u)
    + u * max|mean|) bounds every mean. Each join multiplies squares by up to 1 + share_error + 7u;
    that deltas are off by 2e adds sum(w * (4 e |delta| + 4 e^2)), where the weights w = n_a n_b / n
    add up to depth * n at most, and sum(w * delta^2) to M2.
    """
    counts, means, squares = map(exact, states.T)
    count = sum(counts)
    mean = sum(n * m for n, m in zip(counts, means, strict=True)) / count
    between = sum(n * (m - mean) ** 2 for n, m in zip(counts, means, strict=True))
    m2 = float(sum(squares) + between)
    spread = float(max(means) - min(means))
    error = depth * (spread * (share_error + 2 * U64) + U64 * float(max(map(abs, means))))
    weights = depth * float(count)
    more = 4 * error * sqrt(weights * float(between)) + 4 * error**2 * weights
    assert got[0] == (float(count) if share_error == U64 else np.float32(float(count)))
    assert abs(Fraction(float(got[1])) - mean) <= MORE * error
    assert abs(float(got[2]) - m2) <= MORE * (depth * (share_error + 7 * U64) * m2 + more)


#: The share n_b / n: `merge` adds and divides in float64, counts being exact; `join` in float32.
JOINS = {"merge": U64, "join": U32}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("command", JOINS)
def test_states_of_single_values_are_joined(command: str, order: str) -> None:
    postfix, depth = order_of(order, 61)
    sets = np.stack(list(value_sets(61).values()))
    states = np.stack([np.ones_like(sets), sets, np.zeros_like(sets)], -1)
    for got, of in zip(joined(command, states, postfix), states, strict=True):
        check_joined(got, of, depth, JOINS[command])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("command", JOINS)
def test_states_of_unequal_counts_are_joined(command: str, order: str) -> None:
    postfix, depth = order_of(order, 24)
    generator = np.random.default_rng(0)
    sets = np.stack(list(value_sets(24).values()))
    counts = generator.integers(1, 2**19, sets.shape).astype(np.float64)
    states = np.stack([counts, sets, counts * generator.random(sets.shape)], -1)
    for got, of in zip(joined(command, states, postfix), states, strict=True):
        check_joined(got, of, depth, JOINS[command])


@pytest.mark.parametrize("command", JOINS)
def test_counts_beyond_float32_s_integers_are_joined(command: str) -> None:
    counts = [1.0, 3.0, 2.0**24 - 1, 2.0**24 + 2, 2.0**30, 2.0**33 - 2**9]
    pairs = np.array(list(itertools.product(counts, counts)))
    means = np.random.default_rng(0).standard_normal(pairs.shape) + 10
    states = np.stack([pairs, means, pairs * 0.5], -1)
    # `join` rounds the sum of the counts, too.
    error = JOINS[command] * (2 if command == "join" else 1)
    for got, of in zip(joined(command, states, [0, 0, 1]), states, strict=True):
        check_joined(got, of, 1, error)


@pytest.mark.parametrize("command", JOINS)
def test_an_empty_side_leaves_the_other_bit_for_bit(command: str) -> None:
    full = np.array([[5.0, v, w] for v in (0.1, -0.0, nan, -inf, 1e-310) for w in (0.3, 0.0, inf)])
    for nothing in ([0.0, 0.0, 0.0], [0.0, nan, nan], [0.0, inf, 1.0]):
        empty = np.broadcast_to(nothing, full.shape)
        for pair in ((full, empty), (empty, full)):
            got = joined(command, np.stack(pair, 1), [0, 0, 1])
            assert np.array_equal(got.view(np.uint64), full.view(np.uint64))


def test_joining_poisons_a_channel_alone() -> None:
    rows = np.array([((1, 2), (3, 4), 5), ((nan, 1), (2, inf), 3)], statistics_of(2))
    out = np.frombuffer(run("join", 0, 0, 1, rows=rows), rows.dtype)[0]
    assert np.isnan(out["mean"][0]) and np.isnan(out["m2"][0])
    assert np.isfinite(out["mean"][1]) and out["m2"][1] == inf


def test_from_shifted_sums() -> None:
    """The mean takes two roundings, a quotient's and a sum's; M2 a quotient's, a product's too."""
    rows = []
    for values in value_sets(50).values():
        for shift in (values[0], values.mean(), values[0] + 2 * values.std()):
            d = values - shift
            rows.append([50, shift, d.sum(), (d * d).sum()])
    got = floats_of("shifted_sums", rows=np.array(rows), columns=3)
    u = Fraction(MORE * U64)
    for row, out in zip(np.array(rows), got, strict=True):
        (n, shift, sum_d, sum_dd), (count, mean, m2) = exact(row), exact(out)
        offset, taken = sum_d / n, sum_d * sum_d / n
        want_mean, want_m2 = shift + offset, max(sum_dd - taken, Fraction())
        assert count == n
        assert abs(mean - want_mean) <= u * (abs(offset) + abs(want_mean))
        assert m2 >= 0
        assert abs(m2 - want_m2) <= u * (2 * taken + abs(sum_dd - taken))


def test_sums_that_rounding_made_impossible() -> None:
    rows = np.array([[4, 1.0, 2.0, 1.0 - U64], [4, 1.0, nan, nan], [4, inf, 0.0, 0.0]])
    got = floats_of("shifted_sums", rows=rows, columns=3)
    assert got[0].tolist() == [4, 1.5, 0.0]
    assert np.isnan(got[1, 1:]).all()
    assert got[2, 1] == inf


# ---------------------------------------------------------------- what a thread sums up

#: Groups of packs as loops with a tail give them, and any mix.
GROUPS = [
    [1],
    [4],
    [1] * 9,
    [4] * 30,
    [4] * 150,
    [3, *[4] * 7],
    [4] * 7 + [3],
    np.random.default_rng(0).choice([1, 2, 4], 40).tolist(),
]


def ran(values: Tensor, groups: Sequence[int], pack: int = 8) -> Array:
    """``Running::add`` of each of the sets ``[sets, values, pack]``: Statistics."""
    assert values.shape[1:] == (sum(groups), pack)
    whole = values.contiguous()
    rows = whole.numpy() if values.dtype == torch.float32 else bits(whole)
    out = run("running", CODES[values.dtype], pack, *groups, rows=rows)
    return np.frombuffer(out, statistics_of(pack))


def slots_of_values(groups: Sequence[int], dtype: torch.dtype) -> Tensor:
    """One set of values per slot of a pack: ``[1, values, 8]``."""
    sets = np.stack(list(value_sets(sum(groups)).values()), -1)
    values = torch.from_numpy(sets).to(dtype)
    # What float16 has no number for is an ordinary value there.
    return torch.where(values.isfinite(), values, torch.ones_like(values))[None]


def check_running(mean: float, m2: float, values: Tensor, steps: int) -> None:
    """Of one slot, in ``steps`` groups.

    With D = max - min, a group's differences have a mean that is off by 4 u D (a difference, three
    additions), a step's addition costs the sum's mean u D, and a move of the shift 3 u D (a share,
    two products): e = (4 + steps + 3 moves) u D in all, and float64's roundings.

    The sum of squares Q is at most 8 M2 where shifts are exact means. What rounding leaves of one,
    r, is less than any value's distance from the mean, so that n r^2 <= M2 and Q <= 17 M2. Q is off
    by 6 u Q in each term (2 of a difference, 4 in a group), by u Q for a step and by 5 u Q for a
    move; and what means are off by makes 2 sqrt(n Q) e for each move and at the end.
    """
    want_mean, want_m2 = truth(values.double().tolist())
    count, rounded = len(values), U64 * float(values.double().abs().max())
    moves = sum(4 * 8**k <= count for k in range(8))
    error = (4 + steps + 3 * moves) * U32 * float(values.double().max() - values.double().min())
    assert abs(Fraction(mean) - want_mean) <= MORE * (error + 2 * rounded)
    squares = 17 * float(want_m2)
    slopes = 2 * (moves + 1) * sqrt(count * squares) * error
    assert abs(m2 - float(want_m2)) <= MORE * (slopes + (6 + steps + 5 * moves) * U32 * squares)


@pytest.mark.parametrize("groups", GROUPS, ids=lambda g: f"{len(g)} of {sum(g)}")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_running_statistics(dtype: torch.dtype, groups: list[int]) -> None:
    values = slots_of_values(groups, dtype)
    got = ran(values, groups)[0]
    assert got["count"] == sum(groups)
    for slot in range(8):
        check_running(got["mean"][slot], got["m2"][slot], values[0, :, slot], len(groups))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_slot_s_statistics_do_not_depend_on_the_pack(dtype: torch.dtype) -> None:
    groups = GROUPS[-1]
    values = slots_of_values(groups, dtype)
    together = ran(values, groups)[0]
    alone = ran(values[0].T[..., None], groups, pack=1)
    assert np.array_equal(alone["mean"][:, 0], together["mean"])
    assert np.array_equal(alone["m2"][:, 0], together["m2"])


@pytest.mark.parametrize("poison", [nan, inf, -inf])
@pytest.mark.parametrize("at", [0, 5, -1])
def test_running_poisons_a_slot_alone(poison: float, at: int) -> None:
    groups = [4, 4, 1, 4, 1, 1]
    clean = slots_of_values(groups, torch.float32)
    poisoned = clean.clone()
    poisoned[0, at, 3] = poison
    got, want = ran(poisoned, groups)[0], ran(clean, groups)[0]
    others = np.arange(8) != 3
    assert not np.isfinite(got["mean"][3]) and np.isnan(got["m2"][3])
    assert np.isfinite(got["mean"][others]).all()
    assert np.array_equal(got["mean"][others], want["mean"][others])
    assert np.array_equal(got["m2"][others], want["m2"][others])
