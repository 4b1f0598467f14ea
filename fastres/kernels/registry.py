"""Who implements which primitive, and why an implementation declines.

Backends announce implementations here when they are imported; the engine asks for the first
one, in order of preference, that does not decline. Adding a kernel is one call of `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastres.kernels.extension import Discovery
from fastres.kernels.reference import ACTIVATIONS
from fastres.kernels.types import Conv

#: The primitives; `fastres.kernels.reference` defines each of them under the same name.
PRIMITIVES = (
    "channel_stats",
    "finalize_stats",
    "scale_shift_act",
    "bn_act_backward_reduce",
    "bn_act_backward_apply",
    "bn_act_forward",
    "bn_act_backward",
    "add_act",
    "act_backward",
    "scale_shift_act_pool",
    "max_pool_backward",
    "conv_forward",
    "conv_backward_data",
    "conv_backward_weight",
    "conv_bn_act",
    "conv_backward",
    "update_running",
)

#: Those that the engine makes of the others where a backend has none of its own.
COMPOSITES = ("bn_act_forward", "bn_act_backward", "conv_backward")

#: Those that return nothing and write into what they are given.
IN_PLACE = ("update_running",)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of an implementation; everything a predicate may look at.

    Attributes:
        device: torch device type ("cpu", "cuda").
        dtype: dtype of the activations.
        channels_last: layout of the activations.
        act: name of the activation involved.
        conv: geometry, for the convolution primitives.
        weight: shape [K, C/groups, kh, kw] of the weight, for the convolution primitives.
        features: what is fused in: "prologue", "stats"; "grad_formed" asks a `conv_backward` to
            form grad_y in a pass of its own, and not in its prologues.
        device_index: of the device among those of its type, or None.
        here: whether it has to be able to run on this machine; False asks what would run on one
            that has such a device.
    """

    device: str
    dtype: torch.dtype
    channels_last: bool
    act: str = "none"
    conv: Conv | None = None
    weight: tuple[int, int, int, int] | None = None
    features: frozenset[str] = frozenset()
    here: bool = True
    device_index: int | None = None

    @property
    def group_width(self) -> int:
        """The smaller of a group's input and output channels; 0 where there is no convolution."""
        if self.conv is None or self.weight is None:
            return 0
        return min(self.weight[1], self.weight[0] // self.conv.groups)


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
_registrations = 0

#: Imports, once, the extensions that are installed: every question to the registry comes first
#: through here. What one registered before it failed is taken back.
load_extensions = Discovery((_TABLE, ACTIVATIONS))


def _always(request: Request) -> str | None:
    return None


def register(
    primitive: str, backend: str, *, why_not: WhyNot = _always, name: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Announce a function as an implementation of `primitive` for `backend`.

    Args:
        primitive: one of `PRIMITIVES`; the signature is that of `fastres.kernels.reference`.
        backend: the name users give to `fastres.use_backend`.
        why_not: predicate; returns None to accept a `Request`, or the reason to decline it.
        name: shown by `fastres explain`; the function's own name by default.

    Raises:
        ValueError: for an unknown primitive, or a name that is taken.
    """
    if primitive not in PRIMITIVES:
        raise ValueError(f"primitive must be one of {PRIMITIVES}, got {primitive!r}")

    def announce(run: Callable[..., Any]) -> Callable[..., Any]:
        global _registrations
        entry = Implementation(primitive, backend, name or run.__name__, run, why_not)
        entries = _TABLE.setdefault((primitive, backend), [])
        if any(e.name == entry.name for e in entries):
            raise ValueError(f"{entry} is already registered for {primitive}")
        entries.append(entry)
        _registrations += 1
        return run

    return announce


def registrations() -> int:
    """How many implementations were announced so far: a choice made before another is stale."""
    return _registrations


def implementations(
    primitive: str | None = None, backend: str | None = None
) -> Iterable[Implementation]:
    """All registered implementations, optionally of one primitive or one backend."""
    load_extensions()
    for (p, b), entries in list(_TABLE.items()):
        if primitive in (None, p) and backend in (None, b):
            yield from entries


def select(
    primitive: str, backends: Sequence[str], request: Request, *more: Request
) -> tuple[Implementation | None, list[str]]:
    """The first implementation, by order of `backends`, that accepts `request`.

    Args:
        primitive: one of `PRIMITIVES`.
        backends: names, the preferred one first.
        request: what is asked.
        more: what the same implementation is also asked, say with another activation.

    Returns:
        (implementation or None, the reasons of those that declined before it).
    """
    load_extensions()
    reasons: list[str] = []
    for backend in backends:
        for entry in _TABLE.get((primitive, backend), ()):
            asked = map(entry.why_not, (request, *more))
            reason = next((r for r in asked if r is not None), None)
            if reason is None:
                return entry, reasons
            reasons.append(f"{entry}: {reason}")
    return None, reasons
