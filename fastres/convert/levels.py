"""Which kernels would run a block, and at which level of fusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.block import Plan, current, known_backend, make_plan
from fastres.block.plan import Context, pools_within, shapes_of
from fastres.kernels import BACKENDS, memory_format_of
from fastres.nn.match import Match


@dataclass(frozen=True)
class Target:
    """Where a block is meant to run; None stands for how its parameters are.

    `why_not_here` says what keeps this machine from it; then a machine like it is meant that can.
    """

    device: str | None = None
    dtype: torch.dtype | None = None
    channels_last: bool | None = None
    backend: str = "auto"
    why_not_here: str | None = None

    @classmethod
    def of(
        cls,
        x: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool | None = None,
        backend: str | None = None,
    ) -> Target:
        """What is given by name, and else the properties of an example input."""
        kind = torch.device(device).type if device is not None else None
        if x is not None:
            kind, dtype = kind or x.device.type, dtype or x.dtype
            if channels_last is None:
                channels_last = memory_format_of(x) == torch.channels_last
        backend = current().backend if backend is None else known_backend(backend)
        why_not = why_not_here(kind, backend)
        if why_not is not None and kind is None:
            kind = BACKENDS[backend].devices[0]
        return cls(kind, dtype, channels_last, backend, why_not)


def why_not_here(device: str | None, backend: str) -> str | None:
    """Why a block cannot run on such a device, or by that backend, on this machine; or None."""
    if backend != "auto" and (reason := BACKENDS[backend].why_not()) is not None:
        return f"backend {backend!r} cannot run here: {reason}"
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return None


def describe(matched: Match, target: Target) -> tuple[str, dict[str, str]]:
    """(level of fusion, primitive -> implementation) of a block.

    Raises:
        NotImplementedError: where the backend that was asked for cannot run it.
    """
    plan = _plan(matched, target)
    if not matched.block.batch_stats and any([c is not None for c in plan.convs]):
        return plan.level, {"conv_bn_act": _joined([c.infer for c in plan.convs if c is not None])}
    entries: dict[str, list[object]] = {}
    for (name, _), entry in plan.pointwise.items():
        entries.setdefault(name, []).append(entry)
    convs = [c for c in plan.convs if c is not None]
    composed = [c for c in convs if c.joint is None]
    entries["conv_forward"] = [c.prologue or c.forward for c in convs]
    entries["conv_backward"] = [c.joint for c in convs if c.joint is not None]
    entries["conv_backward_data"] = [c.data for c in composed]
    entries["conv_backward_weight"] = [c.weight for c in composed]
    return plan.level, {name: _joined(which) for name, which in entries.items() if which}


def _joined(entries: Sequence[object]) -> str:
    return ", ".join(dict.fromkeys(str(entry) for entry in entries))


def _plan(matched: Match, target: Target) -> Plan:
    weights = [layer.weight for layer in matched.layers]
    tensors = [t for layer in matched.layers for t in (layer.weight, *layer[3:7]) if t is not None]
    some = next((w for w in weights if w is not None), tensors[0] if tensors else torch.empty(0))
    channels_last = target.channels_last
    if channels_last is None:
        channels_last = memory_format_of(some) == torch.channels_last
    block = matched.block._replace(save=True, backend=target.backend, level=current().level)
    device, dtype = target.device or some.device.type, target.dtype or some.dtype
    shapes = shapes_of(weights)
    context = Context(device, dtype, channels_last, shapes, here=target.why_not_here is None)
    if block.max_pool is not None and not pools_within(block, context):
        block = block._replace(max_pool=None)
    return make_plan(block, context)
