"""The update of running statistics, by the kernel of `csrc/cuda/update_running.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastres.kernels.cuda.module import launch, why_not
from fastres.kernels.registry import Request, register
from fastres.kernels.running import rows_of
from fastres.kernels.types import RunningUpdate


def _why_not(request: Request) -> str | None:
    """Unlike the kernels over activations this one has float64."""
    if request.dtype == torch.float64:
        request = replace(request, dtype=torch.float32)
    return why_not(request)


@register("update_running", "cuda", why_not=_why_not)
def update_running(updates: Sequence[RunningUpdate]) -> None:
    """One launch for every eight of them; arithmetic in float64."""
    if updates:
        rows = rows_of(updates, lambda t: t)
        launch("update_running", updates[0].stats, rows)
