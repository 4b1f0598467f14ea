"""Which elements the CUDA kernels' threads visit, and which partial results they join."""

from __future__ import annotations

import itertools
from math import prod
from typing import NamedTuple

import numpy as np
import pytest
from functors.program import Array, needs_compiler, run

pytestmark = needs_compiler

#: As fastres::Layout has them.
LAYOUTS = LAST, CONTIGUOUS = 0, 1


def integers(*names: str) -> np.dtype[np.void]:
    return np.dtype([(name, np.int64) for name in names])


THREAD = integers("block", "chunk", "lane", "has_channels", "channel", "steps", "calls")
ITEM = integers("thread", "position", "offset", "mask", "bit")


class Case(NamedTuple):
    """A iterate over an activation; a pack is 8 elements or one."""

    n: int
    c: int
    hw: int
    layout: int
    pack: int
    threads: int
    width: int
    chunk_rows: int

    @property
    def cols(self) -> int:
        """Of the activation as a dense matrix, and of its mask."""
        return self.c if self.layout == LAST else self.hw

    @property
    def rows(self) -> int:
        """Of the iteration: pixels, or images."""
        return self.n * self.hw if self.layout == LAST else self.n

    @property
    def used_width(self) -> int:
        """As wide as asked for, as the block, or as just holds a row; a mask byte takes 8."""
        holds_row = 1 << max(self.cols // self.pack - 1, 0).bit_length()
        return max(min(self.width, self.threads, holds_row), 8 if self.pack == 1 else 1)


# ---------------------------------------------------------------- every pack is visited once

#: (N, C, HW): whole vectors in both layouts, in one, in none; single rows, columns, elements.
SHAPES = [(2, 16, 9), (1, 8, 1), (3, 24, 25), (4, 40, 8), (1, 3, 8), (70, 2, 24), (3, 1, 320)]
SHAPES += [(2, 13, 7), (5, 1, 49), (1, 1, 1), (1, 130, 3), (3, 2, 300), (0, 8, 8)]
#: (threads, width, chunk_rows): all lanes and one, tiles of all widths, rows left over.
TILINGS = [(64, 1, 1), (64, 2, 7), (64, 64, 3), (128, 8, 4), (128, 1024, 1), (256, 4, 10**6)]
TILINGS += [(256, 32, 5)]


def cases(layout: int, pack: int) -> list[Case]:
    product = itertools.product(SHAPES, TILINGS)
    of_pack_one = [Case(*shape, layout, 1, *tiling) for shape, tiling in product]
    return [case._replace(pack=pack) for case in of_pack_one if case.cols % pack == 0]


def visits(of: list[Case], unroll: int, backwards: bool) -> list[tuple[Array, Array]]:
    """The threads (THREAD) of each case's launch, and what items (ITEM) exist for them."""
    out = memoryview(run("visits", unroll, int(backwards), rows=np.array(of, np.int64)))
    found = []
    for _ in of:
        counts = np.frombuffer(out, np.int64, 2)
        threads = np.frombuffer(out, THREAD, counts[0], offset=16)
        items = np.frombuffer(out, ITEM, counts[1], offset=16 + threads.nbytes)
        found.append((threads, items))
        out = out[16 + threads.nbytes + items.nbytes :]
    assert not out
    return found


def check_blocks(case: Case, threads: Array, unroll: int) -> None:
    """What the threads of a block must agree on."""
    blocks = threads.reshape(-1, case.threads)
    for name in ("block", "chunk", "steps", "calls"):
        assert (blocks[name] == blocks[name][:, :1]).all(), name
    assert np.array_equal(blocks["calls"], -(-blocks["steps"] // unroll))
    # The lanes of a column share their channels; those of lane 0 come first.
    width = case.used_width
    assert (blocks["lane"] == np.arange(case.threads) // width).all()
    by_lane = blocks["channel"].reshape(-1, case.threads // width, width)
    assert (by_lane == by_lane[:, :1]).all()
    assert np.array_equal(threads["has_channels"], threads["channel"] < case.c)


def check_items(case: Case, threads: Array, items: Array) -> None:
    """Every pack is visited once, by a thread that knows its channel, in its block's chunk."""
    offset, owners = items["offset"], threads[items["thread"]]
    numel = case.n * case.c * case.hw
    assert np.array_equal(np.sort(offset), np.arange(0, numel, case.pack))
    row, col = np.divmod(offset, case.cols)
    assert np.array_equal(items["mask"], row * -(-case.cols // 8) + col // 8)
    assert case.pack == 8 or np.array_equal(items["bit"], col % 8)
    image, channel = (row, col) if case.layout == LAST else np.divmod(row, case.c)
    assert np.array_equal(owners["channel"], channel)
    assert np.array_equal(owners["chunk"], image // case.chunk_rows)


def check_mask_bytes(case: Case, items: Array) -> None:
    """A byte is written by one thread, or put together by 8 neighbours at the same step."""
    group = items["thread"] if case.pack == 8 else items["thread"] // 8
    steps = items["position"].max(initial=0) + 1
    when = group * steps + items["position"]
    pairs = len(np.unique(when * (items["mask"].max(initial=0) + 1) + items["mask"]))
    assert len(np.unique(when)) == len(np.unique(items["mask"])) == pairs


def check_order(threads: Array, items: Array, backwards: bool) -> None:
    """A thread goes one way through memory; the first and the last step have something to do."""
    same = np.diff(items["thread"]) == 0
    assert ((np.diff(items["offset"])[same] > 0) != backwards).all()
    steps = threads["steps"][items["thread"]]
    blocks, start = np.unique(threads["block"][items["thread"]], return_index=True)
    assert np.array_equal(blocks, np.unique(threads["block"]))
    if len(blocks):
        assert (np.minimum.reduceat(items["position"], start) == 0).all()
        assert np.array_equal(np.maximum.reduceat(items["position"], start) + 1, steps[start])


@pytest.mark.parametrize(("unroll", "backwards"), [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize("pack", [8, 1])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels_last", "contiguous"])
def test_a_launch_visits_every_pack_once(
    layout: int, pack: int, unroll: int, backwards: bool
) -> None:
    of = cases(layout, pack)
    assert len(of) >= 5 * len(TILINGS)
    for case, (threads, items) in zip(of, visits(of, unroll, backwards), strict=True):
        try:
            check_blocks(case, threads, unroll)
            check_items(case, threads, items)
            check_mask_bytes(case, items)
            check_order(threads, items, backwards)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


# ---------------------------------------------------------------- 64 bits

#: Rows, columns, channels, images, elements beyond 2^31 and 2^33; a ResNet's stem at batch 4096.
HUGE = [(4096, 64, 112**2), (2**20, 2048, 49), (1, 24, 2**33 + 8), (2**33 + 5, 8, 8)]
HUGE += [(3, 2**33 + 8, 1), (2**17, 17, 2**16 + 1)]
HUGE_TILINGS = [(256, 32, 1000), (64, 1, 1), (128, 128, 2**40), (256, 8, 2**31 + 3)]


class Visit(NamedTuple):
    """Where a pack is visited, in a launch's own terms."""

    chunk: int
    tile: int
    thread: int
    step: int


class Seen(NamedTuple):
    """What is known there, and of the whole."""

    offset: int
    mask: int
    exists: int
    channel: int
    rounds: int
    steps: int
    tiles: int
    chunks: int
    rows: int
    cols: int
    count: int
    numel: int


def visit_of(case: Case, element: int) -> tuple[Visit, Seen]:
    """Of the pack that begins with an element, in Python's integers."""
    width, last = case.used_width, case.layout == LAST
    lanes, across = case.threads // width, -(-case.cols // case.pack // width)
    row, col = divmod(element, case.cols)
    image, channel = (row, col) if last else divmod(row, case.c)
    chunk, inside = divmod(image, case.chunk_rows)
    rounds, lane = divmod(inside, lanes)
    beside, at = divmod(col // case.pack, width)
    left = min(case.chunk_rows, case.rows - chunk * case.chunk_rows)
    all_rounds = -(-left // lanes)
    return Visit(
        chunk=chunk,
        tile=beside if last else channel,
        thread=lane * width + at,
        step=rounds if last else rounds * across + beside,
    ), Seen(
        offset=element,
        mask=row * -(-case.cols // 8) + col // 8,
        exists=1,
        channel=channel,
        rounds=-(-(left - lane) // lanes),
        steps=all_rounds if last else all_rounds * across,
        tiles=across if last else case.c,
        chunks=-(-case.rows // case.chunk_rows),
        rows=case.n * (case.hw if last else case.c),
        cols=case.cols,
        count=case.n * case.hw,
        numel=case.n * case.c * case.hw,
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", HUGE, ids=str)
def test_offsets_are_64_bits_wide(shape: tuple[int, int, int], layout: int) -> None:
    generator = np.random.default_rng(0)
    rows, want = [], []
    for pack, tiling in itertools.product([8, 1], HUGE_TILINGS):
        case = Case(*shape, layout, pack, *tiling)
        if case.cols % pack == 0:
            packs = prod(shape) // pack
            for at in (0, *generator.integers(0, packs, 50).tolist(), packs - 1):
                visit, seen = visit_of(case, at * pack)
                rows.append([*case, *visit])
                want.append(seen)
    got = np.frombuffer(run("probe", rows=np.array(rows, np.int64)), np.int64)
    assert prod(shape) > 2**31
    assert [Seen(*row) for row in got.reshape(len(rows), -1).tolist()] == want


# ---------------------------------------------------------------- tilings, and shares of a merge


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        *[((t, 8, 1), f"threads must be 64, 128 or 256, got {t}") for t in (0, -64, 32, 96, 512)],
        *[((64, w, 1), f"width must be a power of two, got {w}") for w in (0, -4, 3, 96)],
        *[((64, 8, r), f"chunk_rows must be positive, got {r}") for r in (0, -1)],
    ],
)
def test_a_wrong_tiling_is_refused(tiling: tuple[int, int, int], message: str) -> None:
    case = Case(2, 16, 9, LAST, 8, *tiling)
    with pytest.raises(ValueError, match=f"^{message}\n$"):
        run("probe", rows=np.array([*case, *Visit(0, 0, 0, 0)], np.int64))


def test_lanes_share_parts_out_in_order() -> None:
    """Each of the block's 8 channels: its 32 lanes' parts follow one another, and are all."""
    groups, parts = [0, 3, 2**31], [*range(70), 255, 256, 257, 1000, 2**31 + 7, 2**40]
    rows = np.array(list(itertools.product(groups, parts, range(256))), np.int64)
    got = np.frombuffer(run("share", rows=rows), np.int64)
    channel, begin, end = np.moveaxis(got.reshape(len(groups), len(parts), 32, 8, 3), -1, 0)
    first = 8 * np.array(groups)[:, None, None, None]
    assert (channel == first + np.arange(8)).all()
    whole = np.array(parts)[:, None]
    assert (begin[:, :, 0] == 0).all() and (end[:, :, -1] == whole).all()
    assert np.array_equal(begin[:, :, 1:], end[:, :, :-1])
    length, most = end - begin, -(-whole[..., None] // 32)
    assert ((length >= 0) & (length <= most)).all()
