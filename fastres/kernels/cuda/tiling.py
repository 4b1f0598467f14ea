"""How the kernels' threads share an activation out, and the tilings there are to choose from."""

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

#: Stages of the asynchronous-copy pipelines, `fastres::cuda::kPipelineStages`.
PIPELINE_STAGES = 4

#: Threads of the blocks that share an L2 channel block, `fastres::cuda::kChannelBlockThreads`.
CHANNEL_BLOCK_THREADS = 256


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
    def rows(self) -> int:
        """Pixels under channels_last, images else: what chunks are made of."""
        return self.n * self.hw if self.layout == 0 else self.n

    @property
    def accesses(self) -> int:
        """Vectors in one row of one channel tile, or elements where a row has no whole vectors."""
        cols = self.c if self.layout == 0 else self.hw
        return cols // VECTOR if cols % VECTOR == 0 else cols

    @property
    def whole_vectors(self) -> bool:
        """Whether rows consist of whole vectors, under channels_last."""
        return self.layout == 0 and self.c % VECTOR == 0


class Tiling(NamedTuple):
    """`fastres::cuda::Tiling`: threads of a block, vectors side by side, rows of a block.

    With `stages` (0 or PIPELINE_STAGES) a thread's next vectors come through shared memory while it
    computes; kernels without such a pipeline, or without one for a tensor, ignore it.
    """

    threads: int
    width: int
    chunk_rows: int
    stages: int = 0


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tiling(shape: Shape, threads: int, width: int, blocks: int) -> Tiling:
    """Cuts the rows so that about `blocks` blocks result."""
    width = min(width, threads, _power_above(shape.accesses))
    lanes = threads // width
    tiles = -(-shape.accesses // width) if shape.layout == 0 else shape.c
    chunks = max(1, min(-(-shape.rows // lanes), blocks // tiles))
    rows = -(-shape.rows // chunks)
    return Tiling(threads, width, -(-rows // lanes) * lanes)


# Two or three blocks of 256 threads are resident on a multiprocessor, by their registers: what 6
# divides makes whole waves of either.


@lru_cache(maxsize=1024)
def map_tilings(shape: Shape, multiprocessors: int) -> tuple[Tiling, ...]:
    """For elementwise kernels: whole rows side by side; the likeliest first."""
    variants = [(256, 12), (256, 6), (256, 4), (256, 24), (128, 12), (128, 24)]
    tilings = (_tiling(shape, t, 256, multiprocessors * blocks) for t, blocks in variants)
    return tuple(dict.fromkeys(tilings))


@lru_cache(maxsize=1024)
def sum_tilings(shape: Shape, multiprocessors: int) -> tuple[Tiling, ...]:
    """For reductions: narrower, for several rows at a time; each block leaves a partial result."""
    variants = [(256, 32, 6), (256, 16, 6), (256, 32, 3), (256, 32, 2), (256, 32, 4), (256, 8, 6)]
    variants += [(128, 16, 12)]
    tilings = (_tiling(shape, t, width, multiprocessors * blocks) for t, width, blocks in variants)
    return tuple(dict.fromkeys(tilings))


def with_pipelines(shape: Shape, tilings: Sequence[Tiling]) -> tuple[Tiling, ...]:
    """The likeliest of them also with a pipeline through shared memory, where there is one.

    A pipeline keeps memory busy while blocks compute, for some instructions more: which of the two
    counts is for the GPU to say.
    """
    if not shape.whole_vectors or shape.dtype == DTYPE_CODES[torch.float32]:
        return tuple(tilings)
    return *tilings, *(t._replace(stages=PIPELINE_STAGES) for t in tilings[:3] if t.threads == 256)


@lru_cache(maxsize=1024)
def channel_block_tilings(shape: Shape, blocks: int, values: int) -> tuple[Tiling, ...]:
    """For L2 channel blocks: each of `blocks` resident thread blocks has its rows in all of them.

    They are as wide as `values` elements allow, and narrower: to 32 bytes in a row, what memory
    reads at once. There are none where not even that fits.
    """
    if not shape.whole_vectors:
        return ()
    chunk = -(-shape.rows // blocks)
    tilings = []
    for width in (32, 16, 8, 4, 2):
        if width // 2 >= shape.accesses or shape.rows * width * VECTOR > values:
            continue
        lanes = CHANNEL_BLOCK_THREADS // width
        tilings.append(Tiling(CHANNEL_BLOCK_THREADS, width, -(-chunk // lanes) * lanes))
    return tuple(tilings)


def choose(
    name: str,
    shape: Shape,
    device: torch.device,
    flags: tuple[int | str | bool, ...],
    run: Callable[[Tiling], object] | None,
    *,
    sums: bool = False,
    pipelines: bool = False,
) -> Tiling:
    """The tiling for a kernel: tuned where `run` may be repeated, else the heuristic's."""
    candidates = (sum_tilings if sums else map_tilings)(shape, processors(device))
    if pipelines:
        candidates = with_pipelines(shape, candidates)
    if run is None:
        return candidates[0]
    return tuned(f"cuda/{name}", binary(), (*shape, *flags), candidates, run, device)


def partials(
    shape: Shape, tiling: Tiling, rows: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for the partial results that a reduction leaves: one per chunk."""
    chunks = -(-shape.rows // tiling.chunk_rows)
    return torch.empty(chunks, rows, shape.c, dtype=dtype, device=device)
