"""The CUDA kernels run on a GPU where there is one, else on the CPU, compiled for it.

`make test` runs this folder with the kernels emulated, under AddressSanitizer and UBSan; the
environment for that comes from `tests/cuda_emulation/build.py`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

EMULATED = "FASTRES_CUDA_EMULATION_MODULE" in os.environ
if EMULATED:
    # Before anything imports fastres, which looks for its compiled module at once.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cuda_emulation import build

    build.load()

import pytest  # noqa: E402
import torch  # noqa: E402

from fastres.kernels import BACKENDS  # noqa: E402


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run."""
    if EMULATED:
        return "cpu"
    if (reason := BACKENDS["cuda"].why_not()) is not None:
        pytest.skip(f"{reason}; emulated, `make test` runs them")
    # cuDNN rounds to TF32 or does not as it sees fit for a shape; so that it is a measure of
    # error, neither side does.
    torch.backends.cudnn.allow_tf32 = False
    return "cuda"
