"""Chooses how each convolution of a block runs, by measuring the ways that a plan leaves open.

What is compared is a unit's forward and a unit's backward as a whole, from the same inputs to the
same outputs: a convolution that normalises its input on the way in competes with one that finds
it normalised plus the pass that did so. Passes are counted one by one: where a backend has batch
norm as a whole, the unfused ways are a little faster than they are measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import tuning
from fastres.block.compose import conv_backward, convolve
from fastres.block.plan import Context, ConvPlan, Plan, conv_options
from fastres.block.spec import LEVELS, Block, Unit
from fastres.block.tensors import Act, input_shapes
from fastres.kernels import (
    BACKENDS,
    COMPOSITES,
    Backend,
    Branch,
    Gate,
    Implementation,
    PendingGrad,
    Prologue,
    acc_dtype,
)
from fastres.kernels.common import precision_of

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
    unit: Unit
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
        kind = (str(self.dtype), self.channels_last, *_switches(self.dtype))
        return (*self.shape, *self.weight, *geometry, *flags, *kind)


def _switches(dtype: torch.dtype) -> tuple[str, bool]:
    """Torch's own that make a convolution another one: its precision, its search."""
    return precision_of(dtype), torch.backends.cudnn.benchmark


def tuned_plan(spec: Block, context: Context, plan: Plan, x: Tensor) -> Plan:
    """`plan` with the fastest ways to run its convolutions on x [N, C, H, W].

    Returns `plan` itself where it leaves nothing open, or nothing may be measured and no table
    knows better.
    """
    options = conv_options(spec, context)
    if all(len(found) < 2 for found in options):
        return plan
    switches = (*_switches(x.dtype), torch.are_deterministic_algorithms_enabled())
    key = (spec, context, x.shape, x.device, *switches)
    found = _tuned.get(key)
    if found is None:
        sites = _sites(spec, context, x)
        best = _best if spec.save else _best_forward if spec.batch_stats else _best_inference
        convs = [
            conv if conv is None or site is None else best(plan, choices, site, x.device)
            for conv, choices, site in zip(plan.convs, options, sites, strict=True)
        ]
        found = replace(plan, convs=tuple(convs))
        if x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            if len(_tuned) >= _MOST_KEPT:
                _tuned.clear()
            _tuned[key] = found
    return found


def _sites(spec: Block, context: Context, x: Tensor) -> list[Site | None]:
    shapes = input_shapes(spec, x.shape, context.weights)
    found: list[Site | None] = []
    for i, (unit, weight) in enumerate(zip(spec.all_units, context.weights, strict=True)):
        inner = 0 < i < len(spec.units)
        previous = spec.units[i - 1] if inner else Unit()
        pends = previous.norm is not None or previous.act != "none"
        before = previous.act if pends and not previous.scale else None
        keeps = inner and spec.keeps_activated
        site = None
        if weight is not None:
            site = Site(
                shapes[i], weight, unit, before, keeps, context.dtype, context.channels_last
            )
        found.append(site)
    return found


Kind = Callable[[Plan, ConvPlan, "Inputs"], Thunk]


def _choose(
    kind: str, thunk: Kind, plan: Plan, options: Sequence[ConvPlan], site: Site,
    device: torch.device,
) -> ConvPlan:  # fmt: skip
    inputs = Inputs(site, device)

    def prepare(thunks: Sequence[Thunk]) -> None:
        for backend in _backends([part for option in options for part in _parts(option)]):
            if backend.prepare is not None:
                backend.prepare(thunks)

    return tuning.choose(
        tuning.Problem(f"unit/{kind}", site.sizes, _source(plan, options)),
        options,
        lambda option: thunk(plan, option, inputs),
        device=device,
        name=_name,
        prepare=prepare,
    )


def _source(plan: Plan, options: Sequence[ConvPlan]) -> str:
    """Who runs the passes around the convolutions, measured with them, and all kernels."""
    passes = [entry for (name, _), entry in plan.pointwise.items() if name not in COMPOSITES]
    by = dict.fromkeys(entry.backend for entry in passes)
    kernels = _backends([*passes, *(part for option in options for part in _parts(option))])
    return " ".join([*by, *(found for one in kernels if (found := one.source()))])


def _backends(parts: Sequence[Implementation | None]) -> list[Backend]:
    return [BACKENDS[name] for name in sorted({one.backend for one in parts if one is not None})]


def _best(plan: Plan, options: Sequence[ConvPlan], site: Site, device: torch.device) -> ConvPlan:
    """The fastest forward with the fastest backward: both take and leave the same tensors."""
    forward = _choose("forward", _forward, plan, options, site, device)
    backward = _choose("backward", _backward, plan, options, site, device)
    level = min(forward.level, backward.level, key=LEVELS.index)
    return replace(
        forward, level=level, data=backward.data, weight=backward.weight, joint=backward.joint
    )


def _best_forward(
    plan: Plan, options: Sequence[ConvPlan], site: Site, device: torch.device
) -> ConvPlan:
    return _choose("forward", _forward, plan, options, site, device)


def _best_inference(
    plan: Plan, options: Sequence[ConvPlan], site: Site, device: torch.device
) -> ConvPlan:
    """Of convolutions with running statistics; the level of fusion is not theirs."""
    distinct = {option.infer: option for option in reversed(options)}
    found = [option for option in options if distinct[option.infer] is option]
    return _choose("infer", _inference, plan, found, site, device)


def _name(option: ConvPlan) -> str:
    """What tells the ways to run a convolution apart."""
    parts = (option.level, *_parts(option))
    return " ".join(str(part) for part in parts) + (" stats" if option.stats else "")


def _parts(option: ConvPlan) -> tuple[Implementation | None, ...]:
    return (option.forward, option.prologue, option.data, option.weight, option.joint, option.infer)


# ---------------------------------------------------------------- what is measured


class Inputs:
    """What a site's alternatives are measured on: random, made once, when the first one asks.

    The random numbers are the tuner's own: a user's stay what they were.
    """

    def __init__(self, site: Site, device: torch.device) -> None:
        self.site, self.device = site, device
        n, _, *size = site.shape
        conv = site.unit.conv
        assert conv is not None
        self.conv = conv
        self.out_shape = (n, site.weight[0], *conv.output_size(size, site.weight[2:]))

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def _random(self, shape: Sequence[int]) -> Tensor:
        fmt = torch.channels_last if self.site.channels_last else torch.contiguous_format
        t = torch.empty(*shape, dtype=self.site.dtype, device=self.device, memory_format=fmt)
        return t.normal_(generator=self._generator)

    def stats(self, channels: int) -> Tensor:
        """Statistics of a standard normal tensor: mean 0, the rest 1 but for the shift."""
        stats = torch.ones(5, channels, dtype=acc_dtype(self.site.dtype), device=self.device)
        stats[0], stats[4] = 0, 0.1
        return stats

    @cached_property
    def x(self) -> Tensor:
        """The convolution's input, raw."""
        return self._random(self.site.shape)

    @cached_property
    def weight(self) -> Tensor:
        """Its weight."""
        return self._random(self.site.weight)

    @cached_property
    def prologue(self) -> Prologue | None:
        """What is pending on the input."""
        act = self.site.act_before
        return None if act is None else Prologue(self.stats(self.site.shape[1]), act)

    @property
    def act(self) -> Act:
        """The input, with what is pending on it."""
        if self.prologue is None:
            return Act(self.x)
        return Act(self.x, *self.prologue)

    @cached_property
    def pending(self) -> PendingGrad:
        """The gradient of the raw output."""
        channels, unit = self.out_shape[1], self.site.unit
        branch = Branch(self._random(self.out_shape), self.stats(channels))
        count = self.out_shape[0] * self.out_shape[2] * self.out_shape[3]
        sums = torch.ones(3, channels, dtype=branch.stats.dtype, device=self.device)
        grad = self._random(self.out_shape)
        return PendingGrad(grad, _gate(unit.act), branch, sums, count if unit.batch_stats else 0)


def _gate(act: str) -> Gate:
    return Gate("none", None, "none") if act == "none" else Gate("affine", None, act)


def _forward(plan: Plan, option: ConvPlan, given: Inputs) -> Thunk:
    unit, keeps = given.site.unit, given.site.keeps
    pending, weight = given.act, given.weight

    def run() -> None:
        raw, state, _ = convolve(plan, option, unit, (weight, None), pending, keeps)
        if state is None and unit.batch_stats:
            plan.run("channel_stats")(raw)

    return run


def _inference(plan: Plan, option: ConvPlan, given: Inputs) -> Thunk:
    stats = given.stats(given.out_shape[1])
    return lambda: option.infer.run(given.x, given.weight, None, given.conv, stats, act="none")


def _backward(plan: Plan, option: ConvPlan, given: Inputs) -> Thunk:
    prologue, pending = given.prologue, given.pending
    below = None
    if prologue is not None:
        below = (_gate(prologue.act), Branch(given.x, prologue.stats))
    wanted: dict[str, Any] = {
        "prologue": None if given.site.keeps else prologue,
        "want_x": True,
        "want_weight": True,
        "accumulate": None,
        "reduce": below,
    }
    run = option.joint.run if option.joint else conv_backward(plan, option)
    return lambda: run(pending, given.x, given.weight, given.conv, **wanted)
