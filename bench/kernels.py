"""The fused CPU kernels alone, against the time their bytes take at the measured copy bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from bench.shapes import IDENTITY
from fastres.backends.cpu import module, pointwise
from fastres.primitives import Branch, Gate


def _alternate(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def kernel_rows(dtype: torch.dtype, rounds: int = 21) -> list[dict[str, object]]:
    """One row per kernel and shape: milliseconds, and the ratio to a copy of as many bytes."""
    rows = []
    for shape in IDENTITY:
        size = (shape.batch, shape.outputs, shape.size, shape.size)
        for name, (passes, median, copy) in _time_shape(size, dtype, rounds).items():
            rows.append(
                {
                    "kernel": name,
                    "shape": "x".join(map(str, size)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": round(median, 3),
                    "over_copy": round(median / (copy * passes / 2), 2),
                }
            )
    return rows


def _time_shape(
    size: tuple[int, ...], dtype: torch.dtype, rounds: int
) -> dict[str, tuple[int, float, float]]:
    """Kernel -> (tensors it passes over, its ms, ms of a copy, which passes over two)."""
    y, r, out, other = (module.empty(size, dtype, channels_last=True).normal_() for _ in range(4))
    stats = torch.rand(5, size[1])
    _, mask = pointwise.scale_shift_act(y, stats, residual=r, act="relu", want_mask=True)
    gate, branch = Gate("mask", mask), (Branch(y, stats),)
    sums = pointwise.bn_act_backward_reduce(r, gate, branch)
    count = size[0] * size[2] * size[3]
    steps: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: other.copy_(y)),
        "channel_stats": (1, lambda: pointwise.channel_stats(y)),
        "scale_shift_act": (2, lambda: pointwise.scale_shift_act(y, stats, act="relu", out=out)),
        "scale_shift_act + residual": (
            3,
            lambda: pointwise.scale_shift_act(
                y, stats, residual=r, act="relu", want_mask=True, out=out
            ),
        ),
        "bn_act_backward_reduce": (2, lambda: pointwise.bn_act_backward_reduce(r, gate, branch)),
        "bn_act_backward_apply": (
            3,
            lambda: pointwise.bn_act_backward_apply(
                r, gate, branch, sums, count, want_grads=(True,), out=out
            ),
        ),
        "act_backward": (2, lambda: pointwise.act_backward(r, gate, out=out)),
    }
    medians = _alternate({name: step for name, (_, step) in steps.items()}, rounds)
    return {
        name: (steps[name][0], medians[name], medians["copy"]) for name in steps if name != "copy"
    }
