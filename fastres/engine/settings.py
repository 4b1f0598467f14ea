"""Process-wide choices: which backend runs a block, and what it keeps for backward."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastres.backends import BACKENDS

MEMORY_MODES = ("auto", "speed", "balanced", "lean")


@dataclass
class Settings:
    """The current choices; set through `use_backend` and `use_memory`."""

    backend: str = "auto"
    memory: str = "auto"


def _check(kind: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{kind} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _check_backend(name: str) -> str:
    _check("backend", name, ("auto", *BACKENDS))
    if name != "auto" and (reason := BACKENDS[name].why_not()) is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return name


#: FASTRES_BACKEND is looked at when a block first runs, so that a wrong value does not break
#: `import fastres`; None stands for "not looked at yet".
_settings = Settings()
_environment: dict[str, str] | None = {
    key: os.environ[f"FASTRES_{key.upper()}"]
    for key in ("backend", "memory")
    if f"FASTRES_{key.upper()}" in os.environ
}


def current() -> Settings:
    """The choices in force."""
    global _environment
    if _environment is not None:
        if "backend" in _environment:
            _settings.backend = _check_backend(_environment["backend"])
        if "memory" in _environment:
            _settings.memory = _check("memory", _environment["memory"], MEMORY_MODES)
        _environment = None
    return _settings


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run blocks on one backend inside a `with`; backward follows its own forward.

    Args:
        name: "cpu", "triton", "cuda", "aten", "reference" or "auto" (the fastest that can).

    Raises:
        ValueError: for an unknown name.
        RuntimeError: where that backend cannot run on this machine, with the reason.
    """
    before = current().backend
    _settings.backend = _check_backend(name)
    try:
        yield
    finally:
        _settings.backend = before


@contextmanager
def use_memory(mode: str) -> Iterator[None]:
    """Choose what blocks keep for backward inside a `with`; results are the same in every mode.

    Args:
        mode: "speed" keeps raw and activated tensors, "balanced" recomputes the activated ones,
            "lean" also runs the last convolution again, "auto" is the fastest on the device.

    Raises:
        ValueError: for an unknown mode.
    """
    before = current().memory
    _settings.memory = _check("memory", mode, MEMORY_MODES)
    try:
        yield
    finally:
        _settings.memory = before
