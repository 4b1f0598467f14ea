"""The `cuda` backend: adapts the compiled CUDA C++ kernels of `fastres._cuda`.

cuDNN and cuBLAS, through torch, do the convolutions.
"""

from fastres.kernels.backend import Backend, declare
from fastres.kernels.cuda.module import DEVICES, binary, why_not_here
from fastres.kernels.tape import record

declare(
    Backend(
        "cuda",
        DEVICES,
        why_not=why_not_here,
        fallback=("aten",),
        levels=("b",),
        source=binary,
        record=record,
    )
)

from fastres.kernels.cuda import batch_norm, channel_block, convolution, running  # noqa: E402

__all__ = ["batch_norm", "channel_block", "convolution", "running"]
