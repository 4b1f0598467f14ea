"""Launches of the kernels that walk over whole activations, with their tuned tilings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.common import floats
from fastres.kernels.triton.launch import in_words, kernel_of, launch, tuned
from fastres.kernels.triton.support import Matrix, device_of

#: Most elements of a tile where a kernel holds several values of each in registers.
SEVERAL = 2048


@lru_cache(maxsize=1024)
def _tilings(m: Matrix, processors: int, widest: int) -> list[Any]:
    tilings: Callable[..., list[Any]] = kernel_of("walk", "tilings")
    return tilings(m.rows, m.row_bytes, m.channels_last, processors, widest)


def walk(
    module: str,
    name: str,
    m: Matrix,
    tensors: Sequence[Tensor | None],
    flags: dict[str, Any],
    numbers: Sequence[float] = (),
    *,
    in_place: bool = False,
    widest: int = 8192,
) -> None:
    """Run an elementwise kernel over a matrix.

    Args:
        module: file of `fastres.triton_kernels`, or the full name of another module.
        name: of the kernel there.
        m: the activation.
        tensors: the kernel's pointers.
        flags: its constants but for layout and tile.
        numbers: what it takes after the sizes.
        in_place: whether an output is also an input; it is then not tuned, which would run twice.
        widest: most elements of a tile.
    """
    if m.rows == 0 or m.cols == 0:
        return

    def run(tiling: Any) -> None:
        launch_walk(module, name, m, tiling, tensors, flags, numbers)

    run(choose_tiling(module, name, m, tensors, flags, None if in_place else run, widest))


def choose_tiling(
    module: str,
    name: str,
    m: Matrix,
    tensors: Sequence[Tensor | None],
    flags: dict[str, Any],
    run: Callable[[Any], object] | None,
    widest: int = 8192,
) -> Any:
    """The tiling for a kernel: tuned where `run` may be repeated, else the heuristic's."""
    first = next(t for t in tensors if t is not None)
    candidates = _tilings(m, device_of(first).processors, widest)
    if run is None:
        return candidates[0]
    dtypes = tuple("-" if t is None else str(t.dtype) for t in tensors)
    sizes = (*m, *dtypes, *map(in_words, flags.values()))
    return tuned(name, module, sizes, candidates, run, first.device)


def launch_walk(
    module: str,
    name: str,
    m: Matrix,
    tiling: Any,
    tensors: Sequence[Tensor | None],
    flags: dict[str, Any],
    numbers: Sequence[float] = (),
) -> None:
    """Run a kernel over a matrix with a given tiling."""
    last = m.channels_last
    sizes = (
        m.rows, m.cols, m.row_bytes, m.channels, tiling.chunk(last),
        tiling.chunks(m.rows, m.row_bytes, last), tiling.steps, *numbers,
    )  # fmt: skip
    constants = {
        **flags,
        "CHANNELS_LAST": last,
        "BLOCK_ROWS": tiling.block_rows,
        "BLOCK_BYTES": tiling.block_bytes,
    }
    grid = tiling.grid(m.rows, m.row_bytes, last)
    launch(kernel_of(module, name), grid, tensors, sizes, constants, num_warps=tiling.num_warps)


def partials_of(m: Matrix, tiling: Any) -> int:
    """How many partial results per channel a reduction leaves."""
    chunks: int = tiling.chunks(m.rows, m.row_bytes, m.channels_last)
    return chunks if m.channels_last else chunks * (m.rows // m.channels)


def merge_stats(partials: Tensor, counts: Tensor) -> Tensor:
    """(mean, M2) [2, C] out of partials [P, 3, C] and their counts [P], in a fixed order."""
    kernel = kernel_of("channel_stats", "merge_stats_kernel")
    constants = kernel_of("channel_stats", "MERGE")
    channels, device = partials.shape[2], partials.device
    while True:
        groups = -(-len(partials) // constants["GROUP"])
        last = groups == 1
        merged = floats(groups, 2 if last else 3, channels, device=device)
        merged_counts = floats(groups, device=device)
        grid = (groups * -(-channels // constants["CHANNELS"]),)
        tensors = (partials, counts, merged, merged_counts)
        launch(kernel, grid, tensors, (len(partials), channels), {"LAST": last, **constants})
        if last:
            return merged[0]
        partials, counts = merged, merged_counts


def sum_partials(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum over the first dimension of a dense tensor, in a fixed order."""
    kernel = kernel_of("bn_act", "sum_partials_kernel")
    width = partials[0].numel()
    while True:
        constants = kernel_of("bn_act", "sum_shape")(len(partials))
        groups = -(-len(partials) // constants["GROUP"])
        last = groups == 1
        merged = torch.empty(
            groups, *partials.shape[1:], dtype=dtype if last else torch.float32,
            device=partials.device,
        )  # fmt: skip
        grid = (groups * -(-width // constants["COLUMNS"]),)
        launch(kernel, grid, (partials, merged), (len(partials), width), constants)
        if last:
            return merged[0]
        partials = merged
