"""The CUDA kernel of running statistics against nn.BatchNorm2d."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from running_checks import KERNEL_CHECKS, Run

from fastres.kernels import implementations

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_running_statistics(check: Callable[[Run, str], None], device: str) -> None:
    (entry,) = implementations("update_running", "cuda")
    check(entry.run, device)
