"""The update of running statistics, by the kernel of `csrc/cpu/update_running.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

from fastres.kernels.cpu.module import module
from fastres.kernels.registry import Request, register
from fastres.kernels.running import RUNNING_DTYPES, rows_of
from fastres.kernels.types import RunningUpdate

_update_running = module().update_running


def _why_not(request: Request) -> str | None:
    if request.device != "cpu":
        return f"it runs on the CPU, got {request.device}"
    if request.dtype not in RUNNING_DTYPES:
        return f"dtype must be float32, bfloat16, float16 or float64, got {request.dtype}"
    return None


@register("update_running", "cpu", why_not=_why_not)
def update_running(updates: Sequence[RunningUpdate]) -> None:
    """All of them in one call, in their order; arithmetic in float64."""
    _update_running(rows_of(updates))
