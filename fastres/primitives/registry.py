"""Who implements which primitive, and why an implementation declines.

Backends announce implementations here when they are imported; the engine asks for the first
one, in order of preference, that does not decline. Adding a kernel is one call of `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastres.primitives.types import ConvSpec

#: The primitives; `fastres.reference` defines each of them under the same name.
PRIMITIVES = (
    "channel_stats",
    "finalize_stats",
    "scale_shift_act",
    "bn_act_backward_reduce",
    "bn_act_backward_apply",
    "add_act",
    "act_backward",
    "conv_forward",
    "conv_backward_data",
    "conv_backward_weight",
    "conv_bn_act",
    "conv_backward",
)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of an implementation; everything a predicate may look at.

    Attributes:
        device: torch device type ("cpu", "cuda").
        dtype: dtype of the activations.
        channels_last: layout of the activations.
        act: name of the activation involved, "none" or "relu".
        conv: geometry, for the convolution primitives.
        kernel: (kh, kw), for the convolution primitives.
        features: what is fused in: "prologue", "stats", "residual", "grad_prologue".
    """

    device: str
    dtype: torch.dtype
    channels_last: bool
    act: str = "none"
    conv: ConvSpec | None = None
    kernel: tuple[int, int] | None = None
    features: frozenset[str] = frozenset()


WhyNot = Callable[[Request], str | None]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute a primitive: a function, whose it is, and when it declines."""

    primitive: str
    backend: str
    name: str
    run: Callable[..., Any]
    why_not: WhyNot

    def __str__(self) -> str:
        return f"{self.backend}:{self.name}"


_TABLE: dict[tuple[str, str], list[Implementation]] = {}


def _always(request: Request) -> str | None:
    return None


def register(
    primitive: str, backend: str, *, why_not: WhyNot = _always, name: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Announce a function as an implementation of `primitive` for `backend`.

    Args:
        primitive: one of `PRIMITIVES`; the signature is that of `fastres.reference`.
        backend: the name users give to `fastres.use_backend`.
        why_not: predicate; returns None to accept a `Request`, or the reason to decline it.
        name: shown by `fastres explain`; the function's own name by default.

    Raises:
        ValueError: for an unknown primitive, or a name that is taken.
    """
    if primitive not in PRIMITIVES:
        raise ValueError(f"primitive must be one of {PRIMITIVES}, got {primitive!r}")

    def announce(run: Callable[..., Any]) -> Callable[..., Any]:
        entry = Implementation(primitive, backend, name or run.__name__, run, why_not)
        entries = _TABLE.setdefault((primitive, backend), [])
        if any(e.name == entry.name for e in entries):
            raise ValueError(f"{entry} is already registered for {primitive}")
        entries.append(entry)
        return run

    return announce


def implementations(
    primitive: str | None = None, backend: str | None = None
) -> Iterable[Implementation]:
    """All registered implementations, optionally of one primitive or one backend."""
    for (p, b), entries in _TABLE.items():
        if primitive in (None, p) and backend in (None, b):
            yield from entries


def select(
    primitive: str, backends: Sequence[str], request: Request
) -> tuple[Implementation | None, list[str]]:
    """The first implementation, by order of `backends`, that accepts `request`.

    Returns:
        (implementation or None, the reasons of those that declined before it).
    """
    reasons: list[str] = []
    for backend in backends:
        for entry in _TABLE.get((primitive, backend), ()):
            reason = entry.why_not(request)
            if reason is None:
                return entry, reasons
            reasons.append(f"{entry}: {reason}")
    return None, reasons
