"""Options of the suites, beside pytest-benchmark's own."""

from __future__ import annotations

import pytest
import torch

from ..arguments import BATCH


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastres")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=sorted(BATCH), default=default)
    group.addoption("--batch-size", type=int, help="default: 256 on a GPU, 16 on a CPU")
    group.addoption("--quick", action="store_true", help="tiny sizes: not a measurement")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where it runs."""
    device_name: str = request.config.getoption("--device")
    return device_name


@pytest.fixture
def batch(request: pytest.FixtureRequest, device: str, quick: bool) -> int:
    """Images."""
    batch_size: int | None = request.config.getoption("--batch-size")
    return batch_size or (2 if quick else BATCH[device])


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether it is a smoke test."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def rounds(quick: bool) -> int:
    """How often each is timed."""
    return 2 if quick else 15
