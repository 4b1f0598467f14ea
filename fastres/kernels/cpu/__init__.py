"""The `cpu` backend: vectorised C++ around oneDNN's convolutions."""

from __future__ import annotations

from fastres.kernels.backend import Backend, declare
from fastres.kernels.cpu.module import why_not_built

declare(Backend("cpu", ("cpu",), why_not=why_not_built, fallback=("aten",)))

if why_not_built() is None:
    from fastres.kernels.cpu import (  # noqa: F401  (register primitives)
        convolution,
        pointwise,
        running,
    )
