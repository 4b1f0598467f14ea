"""The compiled module `fastres._cpu`: found or not, its codes, and memory that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch  # loaded first, so that the module's OpenMP resolves to torch's
from torch import Tensor

from fastres.kernels.common import DTYPE_CODES
from fastres.kernels.types import is_channels_last

_import_error: str | None = None
_cpu: ModuleType | None = None
try:
    _cpu = import_module("fastres._cpu")
except ImportError as error:
    _import_error = str(error)

#: Smaller tensors come from torch: malloc does not give their pages back at every free.
_OWN_BYTES = 1 << 20


def why_not_built() -> str | None:
    """None where the compiled module is there, else why not and what to do."""
    if _cpu is not None:
        return None
    return (
        f"fastres._cpu is missing ({_import_error}); install a C++20 compiler and reinstall fastres"
    )


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: where it was not built.
    """
    if _cpu is None:
        raise RuntimeError(why_not_built())
    return _cpu


def own_memory(size: int) -> bool:
    """Whether a tensor of `size` bytes is to lie in memory of ours."""
    return size >= _OWN_BYTES


def strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, own: bool) -> Tensor:
    """An uninitialised tensor; in memory of our own it does not page-fault at every step.

    Freed memory stays with the allocator of `fastres._cpu` and comes back warm: on a CPU, fresh
    pages cost more than the arithmetic of a batch norm.
    """
    if not own:
        return torch.empty_strided(shape, strides, dtype=dtype)
    capsule = module().empty(list(shape), list(strides), DTYPE_CODES[dtype])
    return torch.utils.dlpack.from_dlpack(capsule)


def empty(shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """An uninitialised [N, C, H, W] tensor, large ones in memory of our own."""
    n, c, h, w = shape
    own = own_memory(n * c * h * w * dtype.itemsize)
    # Who watches torch, as one does who writes a program down, is to see what is allocated.
    if not own or torch._C._len_torch_dispatch_stack():
        fmt = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, memory_format=fmt)
    return strided(
        shape, (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1), dtype, own
    )


def empty_like(t: Tensor) -> Tensor:
    """An uninitialised tensor with the shape, dtype and layout of `t`."""
    return empty(t.shape, t.dtype, is_channels_last(t))
