"""Where Triton's kernels can run, and how they are told about an activation."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.common import ACT_CODES
from fastres.kernels.reference import ACTIVATIONS
from fastres.kernels.registry import Request
from fastres.kernels.types import is_channels_last, mask_shape

#: The first Triton whose language has all that the kernels use.
OLDEST = (3, 3)

#: The first NVIDIA GPUs whose matrix units take bfloat16 (compute capability 8.0, Ampere).
OLDEST_CAPABILITY = (8, 0)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def _why_not_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    try:
        installed = version("triton")
    except PackageNotFoundError:  # built from source and put on the path: take it at its word
        return None
    numbers = tuple(int(n) for n in re.findall(r"\d+", installed)[:2])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"triton must be {oldest} or newer, got {installed}; pip install -U triton"
    return None


@lru_cache(maxsize=16)
def _why_not_gpu(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        need = ".".join(map(str, OLDEST_CAPABILITY))
        return (
            f"the GPU must have compute capability {need} or newer, "
            f"got {'.'.join(map(str, capability))}"
        )
    return None


class Device(NamedTuple):
    """What launch shapes depend on.

    Attributes:
        processors: multiprocessors.
        shared_bytes: shared memory of one program.
        copy_engine: whether tensor descriptors have hardware behind them (Hopper and newer).
        specialises: whether Triton gives warps of a loop different work (Blackwell and newer).
    """

    processors: int
    shared_bytes: int
    copy_engine: bool = False
    specialises: bool = False


#: A device to act as if there were, with tensors on "meta": launches can then be recorded.
_pretended: Device | None = None


@contextmanager
def pretending(device: Device) -> Iterator[None]:
    """Choose kernels and launch shapes as on such a GPU inside a `with`, for meta tensors."""
    global _pretended
    before, _pretended = _pretended, device
    try:
        yield
    finally:
        _pretended = before


def why_not_here() -> str | None:
    """None where Triton's kernels can run, else the reason and the remedy."""
    if (reason := _why_not_triton()) is not None:
        return reason
    if interpreted() or _pretended is not None:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return _why_not_gpu(torch.cuda.current_device())


def why_not(request: Request) -> str | None:
    """Why the kernels around the convolutions decline a request, or None."""
    if request.here and (reason := why_not_here()) is not None:
        return reason
    if request.device != ("cuda" if _pretended is None else "meta") and not interpreted():
        return f"it runs on a GPU, got {request.device}"
    if request.dtype not in DTYPES:
        return f"dtype must be float32, bfloat16 or float16, got {request.dtype}"
    if request.act in ACT_CODES or "triton" in ACTIVATIONS[request.act].kernels:
        return None
    return f"activation {request.act!r} has no kernel"


class Matrix(NamedTuple):
    """An activation as the memory-bound kernels see it: [rows, cols], and its mask's row."""

    rows: int
    cols: int
    row_bytes: int
    channels: int
    channels_last: bool

    @classmethod
    def of(cls, t: Tensor) -> Matrix:
        """The matrix of a dense [N, C, H, W]."""
        _, c, h, w = t.shape
        last = is_channels_last(t)
        rows, row_bytes = mask_shape(t.shape, last)
        return cls(rows, c if last else h * w, row_bytes, c, last)


def device_of(t: Tensor) -> Device:
    """What launch shapes depend on, of the device that holds a tensor."""
    if _pretended is not None:
        return _pretended
    return _device(t.device.index) if t.device.type == "cuda" else INTERPRETER


@lru_cache(maxsize=16)
def _device(index: int | None) -> Device:
    properties = torch.cuda.get_device_properties(index)  # type: ignore[arg-type]
    # ROCm's properties have no opt-in limit; 64 KiB is what its GPUs give a work group.
    shared = int(getattr(properties, "shared_memory_per_block_optin", 64 << 10))
    capability = (0, 0) if torch.version.hip is not None else (properties.major, properties.minor)
    described = capability >= (9, 0) and find_spec("triton.tools.tensor_descriptor") is not None
    return Device(
        properties.multi_processor_count, shared, described, described and capability >= (10, 0)
    )


#: One multiprocessor, so that programs iterate in the interpreter too.
INTERPRETER = Device(1, 227 << 10, copy_engine=True)
