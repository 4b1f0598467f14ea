"""What a backend is: a name, where it runs, and whether it can run here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Program(Protocol):
    """Calls that were written down: `fastres.kernels.cpu.program`, `fastres.kernels.tape`.

    Attributes:
        layout: how what is kept lies in the tensors that hold it.
    """

    layout: Any

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The outputs and what is kept, in fewer tensors; None where it holds no longer."""

    def views(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in what is kept."""


#: (outputs, what is to be kept)
Results = tuple[Sequence[Tensor], Sequence[Tensor]]


class Recorded(NamedTuple):
    """A program, or None where there can be none; and the results, where they were computed."""

    program: Program | None
    results: Results | None = None


#: (function, the tensors that it reads or writes, the tensors that are the same in every run)
Record = Callable[[Callable[[], Results], Sequence[Tensor], Sequence[Tensor]], Recorded]


@dataclass(frozen=True)
class Backend:
    """A family of implementations that users can ask for by name.

    Attributes:
        name: what `fastres.use_backend` takes.
        devices: torch device types it runs on.
        why_not: None where it can run on this machine, else the reason and the remedy.
        fallback: backends that fill in the primitives it does not implement at all.
        levels: levels of fusion that its convolutions offer, docs/design.md section 6: the one
            that is taken where nothing was measured comes first.
        proven: whether "auto" takes its convolutions where nothing was measured.
        source: identifies the text or the binary of its kernels, for what is kept about them.
        prepare: makes ready, say compiles side by side, all that some functions would launch,
            whatever launch shapes are open; None where there is nothing to do.
        record: writes down what a function launches, to be run again on other tensors without it;
            None where a backend cannot.
    """

    name: str
    devices: tuple[str, ...]
    why_not: Callable[[], str | None]
    fallback: tuple[str, ...] = ()
    levels: tuple[str, ...] = ("c",)
    proven: bool = True
    source: Callable[[], str] = str
    prepare: Callable[[Sequence[Callable[[], object]]], None] | None = None
    record: Record | None = None


BACKENDS: dict[str, Backend] = {}


def declare(backend: Backend) -> None:
    """Make a backend known under its name."""
    BACKENDS[backend.name] = backend


def preference(name: str, device: str, here: bool = True) -> tuple[str, ...]:
    """Backends to ask, best first, for a user's choice `name` on a device type.

    "auto" takes what is available there and ends with aten, which runs everywhere torch does.
    With `here` False, that is what would be available on a machine with such a device.
    """
    if name != "auto":
        chosen = BACKENDS[name]
        return (name, *chosen.fallback)
    order = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device, ())
    usable = [
        n for n in order
        if device in BACKENDS[n].devices and (not here or BACKENDS[n].why_not() is None)
    ]  # fmt: skip
    return (*usable, "aten")
