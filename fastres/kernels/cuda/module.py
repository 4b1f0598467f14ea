"""The compiled module `fastres._cuda`: whether it is there, and on which device it runs."""

from __future__ import annotations

import hashlib
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.cuda.archs import covering
from fastres.kernels.registry import Request
from fastres.kernels.tape import Anew, taping

_import_error: str | None = None
_cuda: ModuleType | None = None
try:
    _cuda = import_module("fastres._cuda")
except ImportError as error:
    _import_error = str(error)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Whether the kernels were compiled for the CPU, by the tests; they then run on the CPU's tensors.
EMULATED = _cuda is not None and bool(_cuda.emulated)

DEVICES = ("cuda", "cpu") if EMULATED else ("cuda",)

#: Multiprocessors of the emulation: one, so that blocks iterate over several tiles there too.
_EMULATED_PROCESSORS = 1
#: Its L2 cache: that of an H200.
_EMULATED_CACHE = 50 << 20


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: where it was not built.
    """
    if _cuda is None:
        raise RuntimeError(_why_not_built())
    return _cuda


@lru_cache(maxsize=1)
def binary() -> str:
    """Identifies the compiled kernels: what was measured with others says nothing about these."""
    file = module().__file__
    assert file is not None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _why_not_built() -> str | None:
    if _cuda is not None:
        return None
    return (
        f"fastres._cuda is missing ({_import_error}); install the CUDA toolkit (nvcc) and "
        "reinstall fastres from source"
    )


@lru_cache(maxsize=16)
def _why_not_gpu(index: int) -> str | None:
    if torch.version.hip is not None:
        return "fastres._cuda needs an NVIDIA GPU"
    kernels = module()
    major, minor = (int(n) for n in kernels.toolkit().split(".")[:2])
    driver = kernels.driver()
    if driver // 1000 < major:
        return f"{_driver_knows(driver)}; it must support CUDA {major}: update it, {_OLDER}"
    capability = torch.cuda.get_device_capability(index)
    code = covering(kernels.archs(), capability)
    if code is None:
        needed = ".".join(map(str, capability))
        return (
            f"fastres._cuda was built for {kernels.archs()}, and the GPU has compute capability "
            f"{needed}; rebuild with FASTRES_CUDA_ARCHS={needed.replace('.', '')}"
        )
    # A driver takes older toolkits' PTX alone, and machine code of its own major version.
    if code.startswith("PTX") and driver < 1000 * major + 10 * minor:
        return (
            f"{_driver_knows(driver)}, and only PTX of CUDA {major}.{minor} runs on this GPU: "
            f"update it, {_OLDER}, or rebuild with FASTRES_CUDA_ARCHS for this GPU"
        )
    return None


_OLDER = "or build fastres with an older toolkit"


def _driver_knows(driver: int) -> str:
    return f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}"


def why_not_here() -> str | None:
    """None where the kernels can run, else the reason and the remedy."""
    if (reason := _why_not_built()) is not None or EMULATED:
        return reason
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return _why_not_gpu(torch.cuda.current_device())


def why_not(request: Request) -> str | None:
    """Why the kernels decline a request, or None."""
    reason = why_not_here() if request.here else _why_not_built()
    if reason is not None:
        return reason
    if request.device not in DEVICES:
        return f"it runs on a GPU, got {request.device}"
    if request.dtype not in DTYPES:
        return f"dtype must be float32, bfloat16 or float16, got {request.dtype}"
    return (
        None
        if request.act in ("none", "relu")
        else f"activation {request.act!r} has no CUDA kernel"
    )


def launch(kernel: str, on: Tensor, *arguments: Any) -> None:
    """Launch a kernel on a tensor's device, on torch's current stream.

    Args:
        kernel: its name in the compiled module.
        on: a tensor there.
        arguments: as the module takes them, with tensors for their addresses and None for none.
    """
    function, index = getattr(module(), kernel), on.device.index
    if (tape := taping()) is not None:
        tape.launch(function, (*arguments, _where_anew(index)))
    function(*[0 if one is None else _addresses(one) for one in arguments], _where(index))


def _addresses(value: Any) -> Any:
    """An argument with addresses for tensors, lists of tuples of them included."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if type(value) in (list, tuple):
        return [_addresses(one) for one in value]
    return value


def _where(index: int | None) -> tuple[int, int]:
    """(device, stream) on which to work: torch's current one."""
    if EMULATED or index is None:
        return 0, 0
    return index, torch._C._cuda_getCurrentRawStream(index)


@lru_cache(maxsize=16)
def _where_anew(index: int | None) -> Anew:
    return Anew(partial(_where, index))


def cache_bytes(device: torch.device) -> int:
    """Size of a device's L2 cache."""
    return _EMULATED_CACHE if EMULATED else _properties(device.index).L2_cache_size


def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return _EMULATED_PROCESSORS if EMULATED else _properties(device.index).multi_processor_count


@lru_cache(maxsize=16)
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)
