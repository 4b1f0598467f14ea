"""Builds and runs `functors.cpp`, under AddressSanitizer and UBSan."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_emulation import build
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.generic]
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which(build.COMPILER), reason="needs g++ on Linux"
)

#: As fastres::DType has them.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
HALVES = [torch.bfloat16, torch.float16]
#: u: half the spacing of numbers at 1. Bounds are derived to first order in u; MORE covers the
#: rest, which is smaller by a factor of u times the number of operations.
U32, U64 = 2.0**-24, 2.0**-53
MORE = 1.01


@functools.cache
def _built() -> Path | RuntimeError:
    """The program, or why there is none, so that a build that fails is tried once."""
    sources = [Path(__file__).with_name("functors.cpp"), build.CSRC / "cuda" / "device.cu"]
    try:
        return build.build_program("functors", sources, "address")
    except RuntimeError as error:
        return error


def run(command: str, *numbers: int, rows: Array | None = None) -> bytes:
    """What the program writes.

    Args:
        rows: what it reads, as it is in memory.

    Raises:
        ValueError: with what the program, or a sanitizer, has to complain of.
    """
    program = _built()
    if isinstance(program, RuntimeError):
        raise program
    done = subprocess.run(
        [program, command, *map(str, numbers)],
        input=b"" if rows is None else rows.tobytes(),
        # The program brings its own runtime, and leaks are looked for with ptrace.
        env=os.environ | {"LD_PRELOAD": "", "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        timeout=60,
    )
    if done.returncode or done.stderr:
        raise ValueError(done.stderr.decode())
    return done.stdout


def floats_of(command: str, *numbers: int, rows: Array, columns: int) -> NDArray[np.float64]:
    """Of a command that writes rows of float64: ``[rows, columns]``."""
    return np.frombuffer(run(command, *numbers, rows=rows)).reshape(-1, columns)


def bits(values: Tensor) -> Array:
    """The bit patterns of 16-bit values, uint16."""
    return values.view(torch.int16).numpy().view(np.uint16)


def exact(row: Iterable[float]) -> list[Fraction]:
    return [Fraction(float(v)) for v in row]
