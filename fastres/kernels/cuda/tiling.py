"""How the kernels' threads share an activation out, and which ways there are to choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.common import DTYPE_CODES
from fastres.kernels.cuda.module import binary, processors
from fastres.kernels.tuned import tuned
from fastres.kernels.types import is_channels_last

#: Elements of a thread's vector access, `fastres::cuda::kVector`.
VECTOR = 8

#: `fastres::cuda::kRingStages`.
RING_STAGES = 4

#: Threads of the blocks that work slab by slab, `fastres::cuda::kSlabThreads`.
SLAB_THREADS = 256


class Shape(NamedTuple):
    """A dense activation as the kernels are told about it."""

    n: int
    c: int
    hw: int
    layout: int
    dtype: int

    @classmethod
    def of(cls, t: Tensor) -> Shape:
        """Of a dense [N, C, H, W]."""
        n, c, h, w = t.shape
        return cls(n, c, h * w, 0 if is_channels_last(t) else 1, DTYPE_CODES[t.dtype])

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.n * self.c * self.hw == 0

    @property
    def rows(self) -> int:
        """Pixels under channels_last, images else: what chunks are made of."""
        return self.n * self.hw if self.layout == 0 else self.n

    @property
    def packs(self) -> int:
        """What the threads of a block stand side by side on, in one row of one channel tile."""
        cols = self.c if self.layout == 0 else self.hw
        return cols // VECTOR if cols % VECTOR == 0 else cols

    @property
    def vectors(self) -> bool:
        """Whether rows consist of whole vectors, under channels_last."""
        return self.layout == 0 and self.c % VECTOR == 0


class Tiling(NamedTuple):
    """`fastres::cuda::Tiling`: threads of a block, packs side by side, rows that it walks over.

    With `stages` (0 or RING_STAGES) a thread's next packs come through shared memory while it
    computes; kernels that have no such way, or not for a tensor, take no notice.
    """

    threads: int
    width: int
    chunk_rows: int
    stages: int = 0


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tiling(shape: Shape, threads: int, width: int, blocks: int) -> Tiling:
    """Cuts the rows so that about `blocks` blocks result."""
    width = min(width, threads, _power_above(shape.packs))
    lanes = threads // width
    tiles = -(-shape.packs // width) if shape.layout == 0 else shape.c
    chunks = max(1, min(-(-shape.rows // lanes), blocks // tiles))
    rows = -(-shape.rows // chunks)
    return Tiling(threads, width, -(-rows // lanes) * lanes)


# Two or three blocks of 256 threads are resident on a multiprocessor, by their registers: what 6
# divides makes whole waves of either.


@lru_cache(maxsize=1024)
def map_tilings(shape: Shape, multiprocessors: int) -> tuple[Tiling, ...]:
    """For elementwise kernels: whole rows side by side; the likeliest first."""
    ways = [(256, 12), (256, 6), (256, 4), (256, 24), (128, 12), (128, 24)]
    made = (_tiling(shape, t, 256, multiprocessors * blocks) for t, blocks in ways)
    return tuple(dict.fromkeys(made))


@lru_cache(maxsize=1024)
def sum_tilings(shape: Shape, multiprocessors: int) -> tuple[Tiling, ...]:
    """For reductions: narrower, for several rows at a time; each block leaves a partial result."""
    ways = [(256, 32, 6), (256, 16, 6), (256, 32, 3), (256, 32, 2), (256, 32, 4), (256, 8, 6)]
    ways += [(128, 16, 12)]
    made = (_tiling(shape, t, width, multiprocessors * blocks) for t, width, blocks in ways)
    return tuple(dict.fromkeys(made))


def with_rings(shape: Shape, tilings: Sequence[Tiling]) -> tuple[Tiling, ...]:
    """The likeliest of them also with packs on their way through shared memory, where that can be.

    It keeps memory busy while blocks compute, for some instructions more: which of the two counts
    is for the GPU to say.
    """
    if not shape.vectors or shape.dtype == DTYPE_CODES[torch.float32]:
        return tuple(tilings)
    return *tilings, *(t._replace(stages=RING_STAGES) for t in tilings[:3] if t.threads == 256)


@lru_cache(maxsize=1024)
def slab_tilings(shape: Shape, blocks: int, values: int) -> tuple[Tiling, ...]:
    """For slabs of channels: each of `blocks` resident blocks has its rows in every slab.

    As wide as `values` elements allow, and narrower: to 32 bytes in a row, what memory reads at
    once. None where not even that fits.
    """
    if not shape.vectors:
        return ()
    chunk = -(-shape.rows // blocks)
    made = []
    for width in (32, 16, 8, 4, 2):
        if width // 2 >= shape.packs or shape.rows * width * VECTOR > values:
            continue
        lanes = SLAB_THREADS // width
        made.append(Tiling(SLAB_THREADS, width, -(-chunk // lanes) * lanes))
    return tuple(made)


def choose(
    name: str,
    shape: Shape,
    device: torch.device,
    flags: tuple[int | str | bool, ...],
    run: Callable[[Tiling], object] | None,
    *,
    sums: bool = False,
    rings: bool = False,
) -> Tiling:
    """The tiling for a kernel: tuned where `run` may be repeated, else the heuristic's."""
    candidates = (sum_tilings if sums else map_tilings)(shape, processors(device))
    if rings:
        candidates = with_rings(shape, candidates)
    if run is None:
        return candidates[0]
    return tuned(f"cuda/{name}", binary(), (*shape, *flags), candidates, run, device)


def partials(
    shape: Shape, tiling: Tiling, rows: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for the partial results that a reduction leaves: one per chunk."""
    chunks = -(-shape.rows // tiling.chunk_rows)
    return torch.empty(chunks, rows, shape.c, dtype=dtype, device=device)
