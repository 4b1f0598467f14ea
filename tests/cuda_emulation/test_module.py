"""The kernels as a Python module: what the emulation and AddressSanitizer see comes out of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

import build  # isort: skip -- of this folder

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which(build.COMPILER), reason="needs g++ on Linux"
)

PROLOGUE = """
import ctypes
import build
cuda = build.load()
floats = (ctypes.c_float * 1024)()  # large enough not to come from Python's own arenas
at, end = ctypes.addressof(floats), ctypes.addressof(floats) + 4096
"""
LAUNCH_TOO_MANY_BLOCKS = """
at += -at % 16
try:
    cuda.bn_act_forward(y=at, partials=at, weight=0, bias=0, eps=1e-5, stats=at, residual=0,
                        residual_stats=0, out=at, mask=0, act=0, shape=(1, 8, 5, 0, 0),
                        tiling=(256, 1, 1, 0), where=(0, 0))
except RuntimeError as error:
    print("RuntimeError:", error)
"""
WRITE_ONE_TOO_MANY = """
cuda.finalize_stats(state=at, count=9, running_mean=0, running_var=0, weight=0, bias=0, eps=1e-5,
                    stats=end - 4 * (5 * 16 - 1), channels=16, where=(0, 0))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | build.environment() | {"PYTHONPATH": str(build.HERE)}
    command = [sys.executable, "-c", PROLOGUE + code]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def test_an_exception_of_a_launch_reaches_python() -> None:
    done = run(LAUNCH_TOO_MANY_BLOCKS)
    assert "RuntimeError: kernel 'bn_act_forward'" in done.stdout, done.stderr
    assert "must be at most resident_blocks, got 5" in done.stdout


def test_a_write_beyond_an_array_of_python_is_reported() -> None:
    done = run(WRITE_ONE_TOO_MANY)
    assert "heap-buffer-overflow" in done.stderr
    assert "finalize_stats_kernel" in done.stderr
    assert done.returncode != 0
