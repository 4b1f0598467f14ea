"""Process-wide choices: which backend runs a block, and what it keeps for backward."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastres.block.spec import LEVELS as FUSION_LEVELS
from fastres.kernels import BACKENDS, load_extensions

MEMORY_MODES = ("auto", "speed", "balanced", "lean")
LEVELS = ("auto", *FUSION_LEVELS)


@dataclass
class Settings:
    """The current choices; set through `use_backend`, `use_memory` and `use_level`."""

    backend: str = "auto"
    memory: str = "auto"
    level: str = "auto"


def _check(kind: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{kind} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def known_backend(name: str) -> str:
    """`name`, where there is such a backend, be it able to run here or not."""
    if name not in ("auto", *BACKENDS):
        load_extensions()  # one of them may declare it
    return _check("backend", name, ("auto", *BACKENDS))


def _check_backend(name: str) -> str:
    known_backend(name)
    if name != "auto" and (reason := BACKENDS[name].why_not()) is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return name


#: FASTRES_BACKEND is looked at when a block first runs, so that a wrong value does not break
#: `import fastres`; None stands for "not looked at yet".
_settings = Settings()
_environment: dict[str, str] | None = {
    key: os.environ[f"FASTRES_{key.upper()}"]
    for key in ("backend", "memory", "level")
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
        if "level" in _environment:
            _settings.level = _check("level", _environment["level"], LEVELS)
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


@contextmanager
def use_level(level: str) -> Iterator[None]:
    """Limit what is fused into the convolutions inside a `with`; results keep their accuracy.

    A backend that offers less does what it can. docs/design.md section 6 has the levels.

    Args:
        level: "b" fuses around the convolutions only, "b'" adds batch statistics to their
            epilogues, "c'" normalisation to their prologues and the reductions of backward to
            their epilogues, "c" the formation of gradients to their prologues; "auto" is the
            fastest measured one.

    Raises:
        ValueError: for an unknown level.
    """
    before = current().level
    _settings.level = _check("level", level, LEVELS)
    try:
        yield
    finally:
        _settings.level = before
