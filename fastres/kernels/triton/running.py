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
from fastres.kernels.triton.launch import kernels, launch
from fastres.kernels.triton.support import why_not
from fastres.kernels.types import RunningUpdate

#: Channels that one program takes at a time.
BLOCK = 128


def _why_not(request: Request) -> str | None:
    """Unlike the kernels over activations this one has float64."""
    if request.dtype in RUNNING_DTYPES:
        request = replace(request, dtype=torch.float32)
    return why_not(request)


@register("update_running", "triton", why_not=_why_not)
def update_running(updates: Sequence[RunningUpdate]) -> None:
    """As many of them per launch as the kernel takes; arithmetic in float64."""
    rows_of(updates)  # checks them, and tells autograd
    most = kernels().update_running.MOST
    for first in range(0, len(updates), most):
        _launch(updates[first : first + most])


def _launch(updates: Sequence[RunningUpdate]) -> None:
    module = kernels().update_running
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
        parts = (mean is not None, var is not None, counter is not None, momentum is None)
        has.append(sum(bit.value * part for bit, part in zip(module.BITS, parts, strict=True)))
    absent = module.MOST - len(updates)
    tensors += [None] * (4 * absent)
    numbers += [0] * (5 * absent)
    has += [0] * absent
    blocks = max(1, -(-widest // BLOCK))
    # A cumulative average counts in one program alone.
    alone = any(u.counter is not None and u.momentum is None for u in updates)
    grid, steps = (1, blocks) if alone else (blocks, 1)
    constants = {**{f"HAS{i}": h for i, h in enumerate(has)}, "BLOCK": BLOCK}
    launch(module.update_running_kernel, (grid,), tensors, (*numbers, steps), constants)


@lru_cache(maxsize=256)
def _bits(momentum: float | Tensor) -> int:
    """The bits of a float64 as an int64."""
    bits: int = struct.unpack("q", struct.pack("d", momentum))[0]
    return bits
