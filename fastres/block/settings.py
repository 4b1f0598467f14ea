"""Choices per thread and asynchronous task: who runs a block, and what it keeps for backward."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from fastres.block.spec import LEVELS as FUSION_LEVELS
from fastres.kernels import BACKENDS, load_extensions

MEMORY_MODES = ("auto", "speed", "balanced", "lean")
LEVELS = ("auto", *FUSION_LEVELS)


class Settings(NamedTuple):
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


#: What was chosen by a `with`, of this thread or asynchronous task, as torch's own modes are.
_chosen: ContextVar[Settings | None] = ContextVar("fastres_settings", default=None)
#: The environment's choices. It is looked at when a block first runs, so that a wrong value does
#: not break `import fastres`.
_defaults: Settings | None = None
#: The choices that were made or ended last, in whichever thread: torch.compile guards on a plain
#: value, and cannot look into a ContextVar.
_latest: Settings | None = None


def current() -> Settings:
    """The choices in force; compiled code goes by those made last in any thread."""
    if torch.compiler.is_compiling():
        return _latest or _defaults or _from_environment()
    return _chosen.get() or _defaults or _from_environment()


def _from_environment() -> Settings:
    global _defaults
    backend, memory, level = [
        os.environ.get(f"FASTRES_{key}", "auto") for key in ("BACKEND", "MEMORY", "LEVEL")
    ]
    _defaults = Settings(
        _check_backend(backend),
        _check("memory", memory, MEMORY_MODES),
        _check("level", level, LEVELS),
    )
    return _defaults


@contextmanager
def _choosing(settings: Settings) -> Iterator[None]:
    global _latest
    token = _chosen.set(settings)
    _latest = settings
    try:
        yield
    finally:
        _chosen.reset(token)
        _latest = _chosen.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run blocks on one backend inside a `with`; backward follows its own forward.

    Args:
        name: "cpu", "triton", "cuda", "aten", "reference" or "auto" (the fastest that can).

    Raises:
        ValueError: for an unknown name.
        RuntimeError: where that backend cannot run on this machine, with the reason.
    """
    with _choosing(current()._replace(backend=_check_backend(name))):
        yield


@contextmanager
def use_memory(mode: str) -> Iterator[None]:
    """Choose what blocks keep for backward inside a `with`; results are the same in every mode.

    Args:
        mode: "speed" keeps raw and activated tensors, "balanced" recomputes the activated ones,
            "lean" also runs a block's last convolution and its projection again, "auto" is the
            fastest on the device.

    Raises:
        ValueError: for an unknown mode.
    """
    with _choosing(current()._replace(memory=_check("memory", mode, MEMORY_MODES))):
        yield


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
    with _choosing(current()._replace(level=_check("level", level, LEVELS))):
        yield
