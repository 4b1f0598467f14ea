"""Fixtures shared by the whole suite."""

from __future__ import annotations

import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

# Before torch loads OpenMP: threads that spin while others compute make a busy machine with few
# cores a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

#: Operators that torchvision declares in its compiled module, in case that cannot be loaded.
_TORCHVISION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_library: torch.library.Library | None = None


def load_torchvision() -> ModuleType:
    """torchvision, also where its compiled module does not fit the torch at hand.

    Its residual networks are plain Python, but importing it registers abstract implementations
    of compiled operators; declaring those is all that is missing.

    Raises:
        ImportError: where torchvision is not installed.
    """
    global _library
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _TORCHVISION_OPERATORS:
            _library.define(schema)
    return importlib.import_module("torchvision")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `grid(n)`, all but each nth set of parameters is `exhaustive`.

    Where n shares no factor with the length of the grid's innermost side, what is left walks
    through its values.
    """
    seen: Counter[str] = Counter()
    for item in items:
        if (mark := item.get_closest_marker("grid")) is not None:
            test = item.nodeid.partition("[")[0]
            if seen[test] % mark.args[0]:
                item.add_marker(pytest.mark.exhaustive)
            seen[test] += 1


@pytest.fixture(scope="session")
def torchvision_or_skip() -> ModuleType:
    """torchvision with its models loaded; skips where it is not installed."""
    try:
        load_torchvision()
        return importlib.import_module("torchvision.models.resnet")
    except ImportError as error:
        pytest.skip(f"torchvision cannot be imported: {error}")


@pytest.fixture
def _poison() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    # Not before the CUDA backend's tests have chosen which compiled module fastres finds.
    from fastres.testing import poisoned_allocations

    with poisoned_allocations():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
