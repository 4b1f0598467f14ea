"""The update of running statistics, by the kernel of `triton_kernels/update_running.py`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from fastres.kernels.registry import Request, register
from fastres.kernels.running import RUNNING_DTYPES, rows_of
from fastres.kernels.triton.launch import kernel_of, launch
from fastres.kernels.triton.support import why_not
from fastres.kernels.types import RunningUpdate

#: `MOST` and the bits of `HAS` in triton_kernels/update_running.py.
MOST = 4
_MEAN, _VAR, _COUNTER, _CUMULATIVE = 1, 2, 4, 8

#: Channels that one program takes at a time.
BLOCK = 128


def _why_not(request: Request) -> str | None:
    """Unlike the kernels over activations this one has float64."""
    if request.dtype in RUNNING_DTYPES:
        request = replace(request, dtype=torch.float32)
    return why_not(request)


@register("update_running", "triton", why_not=_why_not)
def update_running(updates: Sequence[RunningUpdate]) -> None:
    """One launch for every four of them; arithmetic in float64."""
    rows_of(updates)  # checks them, and tells autograd
    for first in range(0, len(updates), MOST):
        _launch(updates[first : first + MOST])


def _launch(updates: Sequence[RunningUpdate]) -> None:
    tensors: list[Tensor | None] = []
    numbers: list[int] = []
    has: list[int] = []
    widest = 0
    for stats, mean, var, counter, momentum, count in updates:
        channels = stats.shape[1]
        widest = max(widest, channels)
        tensors += [stats.contiguous(), mean, var, counter]
        strides = [1 if t is None else t.stride(0) for t in (mean, var)]
        numbers += [channels, *strides, count, _bits(0.0 if momentum is None else momentum)]
        flags = _MEAN * (mean is not None) + _VAR * (var is not None)
        has.append(flags + _COUNTER * (counter is not None) + _CUMULATIVE * (momentum is None))
    absent = MOST - len(updates)
    tensors += [None] * (4 * absent)
    numbers += [0] * (5 * absent)
    has += [0] * absent
    blocks = max(1, -(-widest // BLOCK))
    alone = any(h & _COUNTER and h & _CUMULATIVE for h in has)
    grid, steps = (1, blocks) if alone else (blocks, 1)
    constants = {**{f"HAS{i}": h for i, h in enumerate(has)}, "BLOCK": BLOCK}
    kernel = kernel_of("update_running", "update_running_kernel")
    launch(kernel, (grid,), tensors, (*numbers, steps), constants)


@lru_cache(maxsize=256)
def _bits(momentum: float | Tensor) -> int:
    """The bits of a float64 as an int64."""
    bits: int = struct.unpack("q", struct.pack("d", momentum))[0]
    return bits
