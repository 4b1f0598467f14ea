"""What a measurement holds for: a device and the versions around it, and their file."""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

#: The distributions that install Triton.
_TRITONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")


class Machine(NamedTuple):
    """Everything but the problem that a measurement depends on.

    Attributes:
        device: the GPU's name; "cpu" on a CPU, where nothing is measured.
        arch: compute capability, or gcnArchName with ROCm.
        torch: version of torch.
        triton: version of Triton, "none" without it.
        fastres: version of fastres.
    """

    device: str
    arch: str
    torch: str
    triton: str
    fastres: str

    @property
    def cache_name(self) -> str:
        """Name of the file that keeps this machine's choices."""
        versions = f"torch-{self.torch}_triton-{self.triton}_fastres-{self.fastres}"
        return f"{_slug(self.device)}_{_slug(self.arch)}_{_slug(versions)}.json"

    @property
    def table_name(self) -> str:
        """Name of the table that ships for this device, whatever the versions."""
        return f"{_slug(self.device)}.json"


def _slug(text: str) -> str:
    """A text as a part of a file name: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9.+_]+", "-", text.lower()).strip("-")


def current_device() -> torch.device:
    """The GPU in use, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gpu_index(device: torch.device) -> int:
    """The number of a GPU; torch.device("cuda") is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def machine_of(device: torch.device) -> Machine:
    """What measurements on a device hold for."""
    return _machine(gpu_index(device) if device.type == "cuda" else None)


@cache
def _machine(index: int | None) -> Machine:
    name, arch = "cpu", platform.machine()
    if index is not None:
        gpu = torch.cuda.get_device_properties(index)
        name = gpu.name
        arch = gpu.gcnArchName if torch.version.hip else f"{gpu.major}.{gpu.minor}"
    # `import fastres` would be an arrow upwards, and the package is there when this runs.
    package = sys.modules[__name__.partition(".")[0]]
    release = getattr(package, "__version__", "unknown")
    return Machine(name, arch, torch.__version__, _triton_version(), release)


def _triton_version() -> str:
    for name in _TRITONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"


def _cache_folder() -> Path:
    if folder := os.environ.get("FASTRES_CACHE_DIR"):
        return Path(os.path.expanduser(folder))
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if caches.is_absolute():  # the XDG specification ignores a relative one
        return caches / "fastres"
    try:
        return Path.home() / ".cache" / "fastres"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir(), "fastres")


def cache_file(device: torch.device) -> Path:
    """The file that keeps what is measured on a device, whether or not it exists yet.

    One file per device name, architecture and versions of torch, Triton and fastres; under
    $FASTRES_CACHE_DIR, else $XDG_CACHE_HOME/fastres, else ~/.cache/fastres.
    """
    return _cache_folder() / machine_of(device).cache_name


def forget_machines() -> None:
    """Look at the devices anew."""
    _machine.cache_clear()
