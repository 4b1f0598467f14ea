"""How compiled kernels are told about updates of running statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.common import DTYPE_CODES
from fastres.kernels.types import RunningUpdate

#: What kernels store running statistics in.
RUNNING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: (address, dtype code, stride)
Vector = tuple[int, int, int]
#: (stats, its dtype code, its strides, channels, mean, var, counter, momentum, count)
Row = tuple[int, int, tuple[int, ...], int, Vector, Vector, int, float | Tensor | None, int]

_ABSENT: Vector = (0, 0, 1)


def rows_of(
    updates: Sequence[RunningUpdate], address: Callable[[Tensor], Any] = Tensor.data_ptr
) -> list[Row]:
    """The updates by addresses; tells autograd that their buffers change.

    Args:
        updates: the updates.
        address: what stands for a tensor.

    Raises:
        ValueError: for a buffer that is not [C] or whose channels share memory, stats that are not
            [5, C], or a counter that is not 0-d in int64.
    """
    rows: list[Row] = []
    changed: list[Tensor] = []
    for stats, mean, var, counter, momentum, count in updates:
        height, channels = stats.shape
        counted, first, second = 0, _ABSENT, _ABSENT
        # Comparisons inline: this runs between two convolutions of a small block.
        if mean is not None:
            if mean.shape != (channels,) or ((stride := mean.stride(0)) == 0 and channels > 1):
                raise _wrong("running_mean", mean, channels)
            changed.append(mean)
            first = address(mean), DTYPE_CODES[mean.dtype], stride
        if var is not None:
            if var.shape != (channels,) or ((stride := var.stride(0)) == 0 and channels > 1):
                raise _wrong("running_var", var, channels)
            changed.append(var)
            second = address(var), DTYPE_CODES[var.dtype], stride
        if counter is not None:
            if counter.dim() or counter.dtype != torch.int64:
                raise ValueError(
                    f"counter must be a 0-d int64 tensor, got {counter.dtype} {list(counter.shape)}"
                )
            changed.append(counter)
            counted = address(counter)
        if height != 5:
            raise ValueError(f"stats must have shape [5, C], got {list(stats.shape)}")
        rows.append((
            address(stats), DTYPE_CODES[stats.dtype], stats.stride(), channels, first, second,
            counted, momentum, count,
        ))  # fmt: skip
    torch.autograd.graph.increment_version(changed)
    return rows


def _wrong(name: str, t: Tensor, channels: int) -> ValueError:
    shape = f"{name} must have shape [{channels}], got {list(t.shape)}"
    shared = f"{name} must not be expanded: its channels would share memory"
    return ValueError(shape if t.shape != (channels,) else shared)
