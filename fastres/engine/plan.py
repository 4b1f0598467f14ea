"""A Plan: which implementation runs each primitive of a block, and at which level of fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.backends import BACKENDS, preference
from fastres.engine.spec import BlockSpec, UnitSpec
from fastres.primitives import Implementation, Request, implementations, select

#: Primitives around the convolutions, one choice per block.
_POINTWISE = (
    "channel_stats",
    "finalize_stats",
    "scale_shift_act",
    "bn_act_backward_reduce",
    "bn_act_backward_apply",
    "act_backward",
)


class Signature(NamedTuple):
    """What a plan depends on, apart from the specification."""

    device: str
    dtype: torch.dtype
    channels_last: bool
    kernels: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class ConvPlan:
    """The implementations that one convolution of the block uses.

    `joint` is a backend's own backward of a whole unit (data, weight and the sums for the
    previous batch norm in one go), or None where the primitives are composed.
    """

    forward: Implementation
    prologue: Implementation | None
    stats: bool
    data: Implementation
    weight: Implementation
    joint: Implementation | None
    infer: Implementation

    @property
    def level(self) -> str:
        """Fusion level, in the terms of docs/design.md section 6."""
        if self.joint is not None:
            return "c"
        if self.prologue is not None:
            return "c'"
        return "b'" if self.stats else "b"


@dataclass(frozen=True)
class Plan:
    """Implementations of a block's primitives; `convs` follows `BlockSpec.all_units`."""

    pointwise: dict[str, Implementation]
    convs: tuple[ConvPlan | None, ...]
    declined: tuple[str, ...]

    def run(self, primitive: str) -> Callable[..., Any]:
        """The function that computes a pointwise primitive."""
        return self.pointwise[primitive].run

    @property
    def level(self) -> str:
        """The lowest level among the block's convolutions; "b" for a batch norm alone."""
        order = ("b", "b'", "c'", "c")
        levels = [c.level for c in self.convs if c is not None]
        return min(levels, key=order.index, default="b")


def signature_of(x: Tensor, weights: Sequence[Tensor | None], channels_last: bool) -> Signature:
    """The part of the inputs that the choice of implementations depends on."""
    kernels = tuple(None if w is None else (w.shape[2], w.shape[3]) for w in weights)
    return Signature(x.device.type, x.dtype, channels_last, kernels)


@lru_cache(maxsize=4096)
def make_plan(spec: BlockSpec, signature: Signature) -> Plan:
    """Choose implementations for a block.

    Raises:
        NotImplementedError: where a backend that was asked for by name cannot run the block,
            with its reason.
    """
    choose = _Chooser(spec.backend, signature)
    pointwise = {p: choose(p, act=spec.act) for p in _POINTWISE}
    convs = tuple(
        None if kernel is None else _plan_conv(choose, unit, kernel, spec)
        for unit, kernel in zip(spec.all_units, signature.kernels, strict=True)
    )
    return Plan(pointwise, convs, tuple(dict.fromkeys(choose.declined)))


class _Chooser:
    """Asks the registry, in the order of the user's choice of backend."""

    def __init__(self, backend: str, signature: Signature) -> None:
        self.backend, self.signature = backend, signature
        self.order = preference(backend, signature.device)
        self.declined: list[str] = []

    def ask(self, primitive: str, **request: Any) -> Implementation | None:
        s = self.signature
        asked = Request(s.device, s.dtype, s.channels_last, **request)
        found, reasons = select(primitive, self.order, asked)
        self.declined += reasons
        if self.backend != "auto" and (found is None or found.backend != self.backend):
            self._insist(primitive, asked, reasons)
        return found

    def _insist(self, primitive: str, asked: Request, reasons: list[str]) -> None:
        """A backend asked for by name may leave a primitive out, but not decline a plain one."""
        own = list(implementations(primitive, self.backend))
        fused = asked.features or primitive in ("conv_backward", "conv_bn_act")
        if own and not fused and not primitive.startswith("conv_"):
            raise NotImplementedError(
                f"backend {self.backend!r} cannot run {primitive}: {'; '.join(reasons)}"
            )
        if asked.device not in BACKENDS[self.backend].devices:
            raise NotImplementedError(
                f"backend {self.backend!r} cannot run on device {asked.device!r}: "
                f"it runs on {', '.join(BACKENDS[self.backend].devices)}"
            )

    def __call__(self, primitive: str, **request: Any) -> Implementation:
        found = self.ask(primitive, **request)
        if found is None:
            raise NotImplementedError(
                f"no backend runs {primitive} on {self.signature}: {'; '.join(self.declined)}"
            )
        return found


def _plan_conv(
    choose: _Chooser, unit: UnitSpec, kernel: tuple[int, int], spec: BlockSpec
) -> ConvPlan:
    common: dict[str, Any] = {"conv": unit.conv, "kernel": kernel}
    stats = choose.ask("conv_forward", features=frozenset({"stats"}), **common)
    both = choose.ask("conv_forward", features=frozenset({"stats", "prologue"}), **common)
    return ConvPlan(
        forward=stats or choose("conv_forward", **common),
        prologue=both,
        stats=stats is not None,
        data=choose("conv_backward_data", **common),
        weight=choose("conv_backward_weight", **common),
        joint=choose.ask("conv_backward", act=unit.act, **common),
        infer=choose("conv_bn_act", act=spec.act, **common),
    )
