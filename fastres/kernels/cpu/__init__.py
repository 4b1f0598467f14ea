"""The `cpu` backend: convolutions and what is around them in vectorised C++."""

from __future__ import annotations

from fastres.kernels.backend import Backend, Record, declare
from fastres.kernels.cpu.module import why_not_built

_record: Record | None = None
if why_not_built() is None:  # Each registers its primitives: our own convolutions come first.
    from fastres.kernels.cpu import native  # noqa: F401, I001
    from fastres.kernels.cpu import convolution, pointwise, pooling, running  # noqa: F401
    from fastres.kernels.cpu.program import record as _record

declare(Backend("cpu", ("cpu",), why_not=why_not_built, fallback=("aten",), record=_record))
