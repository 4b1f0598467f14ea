"""What a backend is: a name, where it runs, and whether it can run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """A family of implementations that users can ask for by name.

    Attributes:
        name: what `fastres.use_backend` takes.
        devices: torch device types it runs on.
        why_not: None where it can run on this machine, else the reason and the remedy.
        fallback: backends that fill in the primitives it does not implement at all.
    """

    name: str
    devices: tuple[str, ...]
    why_not: Callable[[], str | None]
    fallback: tuple[str, ...] = ()


BACKENDS: dict[str, Backend] = {}


def declare(backend: Backend) -> None:
    """Make a backend known under its name."""
    BACKENDS[backend.name] = backend


def preference(name: str, device: str) -> tuple[str, ...]:
    """Backends to ask, best first, for a user's choice `name` on a device type.

    "auto" takes what is available there and ends with aten, which runs everywhere torch does.
    """
    if name != "auto":
        chosen = BACKENDS[name]
        return (name, *chosen.fallback)
    order = {"cpu": ("cpu",), "cuda": ("triton",)}.get(device, ())
    usable = [n for n in order if device in BACKENDS[n].devices and BACKENDS[n].why_not() is None]
    return (*usable, "aten")
