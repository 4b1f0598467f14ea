"""Launches of the kernels that iterate over an activation's tiles, with their tuned tilings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from fastres.kernels.triton.launch import in_words, kernels, launch, tuned
from fastres.kernels.triton.support import Matrix, device_of

#: Most elements of a tile where a kernel holds several values of each in registers.
SEVERAL = 2048


@lru_cache(maxsize=1024)
def _tilings(m: Matrix, processors: int, widest: int) -> list[Any]:
    tilings: Callable[..., list[Any]] = kernels().tiling.tilings
    return tilings(m.rows, m.row_bytes, m.channels_last, processors, widest)


def launch_elementwise(
    kernel: Any,
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
        kernel: a `triton.jit` function.
        m: the activation.
        tensors: the kernel's pointers.
        flags: its constants but for layout and tile.
        numbers: what it takes after the sizes.
        in_place: whether an output is also an input; it is then not tuned, which would run twice.
        widest: most elements of a tile.
    """

    def run(tiling: Any) -> None:
        launch_tiled(kernel, m, tiling, tensors, flags, numbers)

    run(choose_tiling(kernel, m, tensors, flags, None if in_place else run, widest))


def choose_tiling(
    kernel: Any,
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
    function = kernel.fn
    return tuned(function.__name__, function.__module__, sizes, candidates, run, first.device)


def launch_tiled(
    kernel: Any,
    m: Matrix,
    tiling: Any,
    tensors: Sequence[Tensor | None],
    flags: dict[str, Any],
    numbers: Sequence[float] = (),
) -> None:
    """Run a kernel over a matrix with the tiling that is given."""
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
    launch(kernel, grid, tensors, sizes, constants, num_warps=tiling.num_warps)


def partials_of(m: Matrix, tiling: Any) -> int:
    """How many partial results per channel a reduction leaves."""
    chunks: int = tiling.chunks(m.rows, m.row_bytes, m.channels_last)
    return chunks if m.channels_last else chunks * (m.rows // m.channels)
