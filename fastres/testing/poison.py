"""Allocations filled with NaN, so that reading what nobody wrote shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from fastres.kernels import BACKENDS


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside a `with`, new memory is NaN: torch's own allocations and those of `fastres._cpu`.

    Torch fills uninitialised memory under deterministic algorithms only; operators that have no
    deterministic version warn instead of raising.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    # A module-level property that the type checker does not see.
    switch: Any = torch.utils.deterministic
    filled = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    _poison_own(True)
    try:
        yield
    finally:
        _poison_own(False)
        switch.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before, warn_only=warn)


def _poison_own(on: bool) -> None:
    if "cpu" in BACKENDS and BACKENDS["cpu"].why_not() is None:
        import_module("fastres._cpu").set_poison(on)
