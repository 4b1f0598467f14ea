"""The `triton` backend: adapts the kernels of `fastres.triton_kernels`.

Triton itself is imported when a kernel first runs, so that `import fastres` stays light.
"""

from fastres.kernels.backend import Backend, declare
from fastres.kernels.tape import record
from fastres.kernels.triton.launch import compile_together, source_hash
from fastres.kernels.triton.support import interpreted, why_not_here

declare(
    Backend(
        "triton",
        ("cuda", "cpu") if interpreted() else ("cuda",),
        why_not=why_not_here,
        fallback=("aten",),
        # Level c forms grad_y anew in every column of programs, which no measurement backs yet.
        levels=("c'", "b'", "b", "c"),
        proven=False,
        source=lambda: source_hash("fastres.triton_kernels.conv"),
        prepare=compile_together,
        record=record,
    )
)

from fastres.kernels.triton import (  # noqa: E402
    batch_norm,
    convolution,
    convolution_backward,
    running,
)

__all__ = ["batch_norm", "convolution", "convolution_backward", "running"]
