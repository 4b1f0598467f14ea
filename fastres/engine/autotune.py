"""Chooses how each convolution of a block runs, by measuring the ways that a plan leaves open.

What is compared is a unit's forward and a unit's backward as a whole, from the same inputs to the
same outputs: a convolution that normalises its input on the way in competes with one that finds
it normalised plus the pass that did so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import tuning
from fastres.engine.compose import Pending, conv_backward, convolve
from fastres.engine.plan import ConvPlan, Plan, Signature, conv_options
from fastres.engine.spec import LEVELS, BlockSpec, UnitSpec
from fastres.engine.tensors import input_shapes
from fastres.primitives import Branch, Gate, PendingGrad, Prologue, acc_dtype

Thunk = Callable[[], object]

_tuned: dict[tuple[Any, ...], Plan] = {}
_MOST_KEPT = 4096


class Site(NamedTuple):
    """Where in its block a convolution stands: all that its alternatives are measured on.

    Attributes:
        shape: [N, C, H, W] of its input.
        weight: shape of its weight.
        unit: its specification.
        act_before: activation that is pending on its input, or None where nothing is.
        keeps: whether the activated input is kept for backward, and so has to be formed.
        dtype: of the activations.
        channels_last: their layout.
    """

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    unit: UnitSpec
    act_before: str | None
    keeps: bool
    dtype: torch.dtype
    channels_last: bool

    @property
    def sizes(self) -> tuple[int | str | bool, ...]:
        """The key under which a choice is kept."""
        conv = self.unit.conv
        assert conv is not None
        geometry = (*conv.stride, *conv.padding, *conv.dilation, conv.groups)
        flags = (self.unit.batch_stats, self.unit.act, str(self.act_before), self.keeps)
        return (*self.shape, *self.weight, *geometry, *flags, str(self.dtype), self.channels_last)


def tuned_plan(spec: BlockSpec, signature: Signature, plan: Plan, x: Tensor) -> Plan:
    """`plan` with the fastest ways to run its convolutions on x [N, C, H, W].

    Returns `plan` itself where it leaves nothing open, or nothing may be measured and no table
    knows better.
    """
    options = conv_options(spec, signature)
    if all(len(found) < 2 for found in options):
        return plan
    key = (spec, signature, x.shape, x.device, torch.are_deterministic_algorithms_enabled())
    found = _tuned.get(key)
    if found is None:
        sites = _sites(spec, signature, x)
        convs = [
            conv if conv is None or site is None else _best(plan, choices, site, x.device)
            for conv, choices, site in zip(plan.convs, options, sites, strict=True)
        ]
        found = replace(plan, convs=tuple(convs))
        if x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            if len(_tuned) >= _MOST_KEPT:
                _tuned.clear()
            _tuned[key] = found
    return found


def _sites(spec: BlockSpec, signature: Signature, x: Tensor) -> list[Site | None]:
    shapes = input_shapes(spec, x.shape, signature.weights)
    found: list[Site | None] = []
    for i, (unit, weight) in enumerate(zip(spec.all_units, signature.weights, strict=True)):
        inner = 0 < i < len(spec.units)
        before = spec.units[i - 1].act if inner else None
        keeps = inner and spec.keeps_activated
        site = None
        if weight is not None:
            site = Site(
                shapes[i], weight, unit, before, keeps, signature.dtype, signature.channels_last
            )
        found.append(site)
    return found


def _best(plan: Plan, options: Sequence[ConvPlan], site: Site, device: torch.device) -> ConvPlan:
    """The fastest forward with the fastest backward: both take and leave the same tensors."""

    def choose(kind: str, thunk: Callable[[Plan, ConvPlan, Site, torch.device], Thunk]) -> ConvPlan:
        return tuning.choose(
            tuning.Problem(f"unit/{kind}", site.sizes),
            options,
            lambda option: thunk(plan, option, site, device),
            device=device,
            name=_name,
        )

    forward, backward = choose("forward", _forward), choose("backward", _backward)
    level = min(forward.level, backward.level, key=LEVELS.index)
    return replace(
        forward, level=level, data=backward.data, weight=backward.weight, joint=backward.joint
    )


def _name(option: ConvPlan) -> str:
    """What tells the ways to run a convolution apart."""
    return f"{option.forward} {option.data} {option.level}"


# ---------------------------------------------------------------- what is measured


def _random(site: Site, shape: Sequence[int], device: torch.device) -> Tensor:
    fmt = torch.channels_last if site.channels_last else torch.contiguous_format
    return torch.randn(*shape, dtype=site.dtype, device=device).contiguous(memory_format=fmt)


def _stats(channels: int, site: Site, device: torch.device) -> Tensor:
    """Statistics of a standard normal tensor: mean 0, the rest 1 but for the shift."""
    stats = torch.ones(5, channels, dtype=acc_dtype(site.dtype), device=device)
    stats[0], stats[4] = 0, 0.1
    return stats


def _prologue(site: Site, device: torch.device) -> Prologue | None:
    if site.act_before is None:
        return None
    return Prologue(_stats(site.shape[1], site, device), site.act_before)


def _gate(act: str) -> Gate:
    return Gate("none", None, "none") if act == "none" else Gate("affine", None, act)


def _forward(plan: Plan, option: ConvPlan, site: Site, device: torch.device) -> Thunk:
    x, weight = _random(site, site.shape, device), _random(site, site.weight, device)
    given = Pending(x, _prologue(site, device))

    def run() -> None:
        raw, state, _ = convolve(plan, option, site.unit, (weight, None), given, site.keeps)
        if state is None and site.unit.batch_stats:
            plan.run("channel_stats")(raw)

    return run


def _backward(plan: Plan, option: ConvPlan, site: Site, device: torch.device) -> Thunk:
    conv = site.unit.conv
    assert conv is not None
    n, _, *size = site.shape
    out = (n, site.weight[0], *conv.output_size(size, site.weight[2:]))
    x, weight = _random(site, site.shape, device), _random(site, site.weight, device)
    gate = _gate(site.unit.act)
    branch = Branch(_random(site, out, device), _stats(out[1], site, device))
    count = n * out[2] * out[3] if site.unit.batch_stats else 0
    sums = torch.ones(3, out[1], dtype=branch.stats.dtype, device=device)
    pending = PendingGrad(_random(site, out, device), gate, branch, sums, count)
    prologue = _prologue(site, device)
    below = None if prologue is None else (_gate(prologue.act), Branch(x, prologue.stats))
    wanted: dict[str, Any] = {
        "prologue": None if site.keeps else prologue,
        "want_x": True,
        "want_weight": True,
        "accumulate": None,
        "reduce": below,
    }
    run = option.joint.run if option.joint else conv_backward(plan, option)
    return lambda: run(pending, x, weight, conv, **wanted)
