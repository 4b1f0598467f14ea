"""A Plan: which implementation runs each primitive of a block, and at which level of fusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.block.spec import LEVELS, Block, Unit
from fastres.kernels import (
    BACKENDS,
    Implementation,
    Request,
    activation,
    implementations,
    preference,
    registrations,
    select,
)
from fastres.kernels.common import precision_of

#: Primitives around the convolutions: those that know no activation, and those that apply one or
#: its derivative.
_PLAIN = ("channel_stats", "finalize_stats")
_ACTING = ("scale_shift_act", "bn_act_backward_reduce", "bn_act_backward_apply")
#: Those of a chain that ends with max pooling.
_POOLING = ("scale_shift_act_pool", "max_pool_backward")
#: A backend asked for by name may decline these for some tensors: another one takes them.
_MAY_DECLINE = ("conv_", *_POOLING)
#: Batch norm as a whole, with the activation; not every backend has it.
_WHOLE = ("bn_act_forward", "bn_act_backward")

Weight = tuple[int, int, int, int]


class Context(NamedTuple):
    """What a choice of implementations depends on, apart from the block: all that predicates read.

    Attributes:
        device: torch device type.
        dtype: of the activations.
        channels_last: layout of the activations.
        weights: shape [K, C/groups, kh, kw] of each unit's weight, or None.
        device_index: of the device among those of its type, or None.
        switches: torch's own that libraries and predicates look at.
        registrations: of kernels, so far.
        here: False for a plan that is only looked at, for a machine that has such a device.
    """

    device: str
    dtype: torch.dtype
    channels_last: bool
    weights: tuple[Weight | None, ...]
    device_index: int | None = None
    switches: tuple[bool | str, ...] = ()
    registrations: int = 0
    here: bool = True


def switches(device: str) -> tuple[bool | str, ...]:
    """torch's switches that change which kernels can or should run on a device type."""
    if device != "cuda":
        return (torch._C._get_mkldnn_enabled(), torch._C._get_deterministic_algorithms())
    return (
        torch._C._get_cudnn_enabled(),
        torch._C._get_cudnn_benchmark(),
        torch._C._get_cudnn_deterministic(),
        torch._C._get_deterministic_algorithms(),
        precision_of(torch.float32),
    )


@dataclass(frozen=True)
class ConvPlan:
    """The implementations that one convolution of the block uses.

    Attributes:
        level: of fusion, docs/design.md section 6: what these implementations fuse.
        forward: the convolution, with statistics where `stats`.
        prologue: the convolution of what is still to be normalised, or None.
        stats: whether the convolution delivers the statistics of its output.
        data: gradient of the input.
        weight: gradient of the weight.
        joint: a backend's own backward of a whole unit (data, weight and the sums for the
            previous batch norm in one go), or None where the primitives are composed.
        infer: convolution with running statistics.
    """

    level: str
    forward: Implementation
    prologue: Implementation | None
    stats: bool
    data: Implementation
    weight: Implementation
    joint: Implementation | None
    infer: Implementation


@dataclass(frozen=True)
class Plan:
    """Implementations of a block's primitives.

    Attributes:
        pointwise: by primitive and activation.
        convs: as `Block.all_units`.
        declined: why others were passed over.
    """

    pointwise: dict[tuple[str, str], Implementation]
    convs: tuple[ConvPlan | None, ...]
    declined: tuple[str, ...]

    def run(self, primitive: str, act: str = "none") -> Callable[..., Any]:
        """The function that computes a pointwise primitive with an activation of the block."""
        found = self.pointwise.get((primitive, act))
        if found is None:  # an open gate: whoever knows an activation can leave it out
            found = next(
                entry for (which, _), entry in self.pointwise.items() if which == primitive
            )
        return found.run

    def whole(self, primitive: str, act: str) -> Callable[..., Any] | None:
        """The function that computes a batch norm as a whole, where the backend has one."""
        found = self.pointwise.get((primitive, act))
        return None if found is None else found.run

    @property
    def implementations(self) -> set[Implementation]:
        """All that may run."""
        own = {
            one
            for c in self.convs
            if c is not None
            for one in (c.forward, c.prologue, c.data, c.weight, c.joint, c.infer)
            if one is not None
        }
        return own | set(self.pointwise.values())

    @property
    def level(self) -> str:
        """The lowest level among the block's convolutions; "b" for a batch norm alone."""
        levels = [c.level for c in self.convs if c is not None]
        return min(levels, key=LEVELS.index, default="b")


def context_of(x: Tensor, weights: Sequence[Tensor | None], channels_last: bool) -> Context:
    """The context of a block that runs on x [N, C, H, W] now."""
    device = x.device
    return Context(
        device.type, x.dtype, channels_last, shapes_of(weights), device.index,
        switches(device.type), registrations(),
    )  # fmt: skip


def shapes_of(weights: Sequence[Tensor | None]) -> tuple[Weight | None, ...]:
    """The shapes of convolution weights."""
    return tuple(None if w is None else (*w.shape,) for w in weights)  # type: ignore[misc]


@lru_cache(maxsize=4096)
def make_plan(spec: Block, context: Context) -> Plan:
    """Choose implementations for a block, without measuring any.

    Raises:
        NotImplementedError: where a backend that was asked for by name cannot run the block,
            with its reason.
    """
    choose = _Chooser(spec.backend, context)
    pointwise = {(p, "none"): choose(p) for p in _PLAIN}
    acts = dict.fromkeys((*[unit.act for unit in spec.units], spec.act))
    pointwise |= {(p, act): choose(p, act=act) for act in acts for p in _ACTING}
    for act in acts:
        backend = pointwise["scale_shift_act", act].backend
        pointwise |= {
            (p, act): found for p in _WHOLE if (found := choose.only(backend, p, act=act))
        }
    # What is not a gate has no backward by its output alone, and no block that would need one.
    for act in acts:
        if activation(act).gate:
            pointwise["act_backward", act] = choose("act_backward", act=act)
    if spec.max_pool is not None:
        for act in dict.fromkeys(("none", spec.act)):
            pointwise["scale_shift_act_pool", act] = choose("scale_shift_act_pool", act=act)
        pointwise["max_pool_backward", "none"] = choose("max_pool_backward")
    convs = tuple(found[0] if found else None for found in _options(choose, spec))
    return Plan(pointwise, convs, tuple(dict.fromkeys(choose.declined)))


@lru_cache(maxsize=4096)
def pools_within(spec: Block, context: Context) -> bool:
    """Whether a kernel pools at the end of a block, one that spares what is pooled.

    torch's own operators would only add the way from their indices to taps: they had better pool
    behind the block.
    """
    choose = _Chooser(spec.backend, context)
    found = [choose.only_kernel("scale_shift_act_pool", act) for act in ("none", spec.act)]
    return all([*found, choose.only_kernel("max_pool_backward", "none")])


@lru_cache(maxsize=4096)
def conv_options(spec: Block, context: Context) -> list[list[ConvPlan]]:
    """For each convolution the ways to run it, that of `make_plan` first."""
    return _options(_Chooser(spec.backend, context), spec)


class _Chooser:
    """Asks the registry, in the order of the user's choice of backend."""

    def __init__(
        self, backend: str, context: Context, order: tuple[str, ...] | None = None
    ) -> None:
        self.backend, self.context = backend, context
        self.order = order or preference(backend, context.device, context.here)
        self.declined: list[str] = []

    def among(self, names: Sequence[str]) -> _Chooser:
        """The same, asking these backends alone."""
        return _Chooser(self.backend, self.context, tuple(names))

    def _request(self, act: str, **more: Any) -> Request:
        c = self.context
        return Request(
            c.device,
            c.dtype,
            c.channels_last,
            act,
            here=c.here,
            device_index=c.device_index,
            **more,
        )

    def only(self, backend: str, primitive: str, *, act: str) -> Implementation | None:
        """What one backend has for a primitive that not every backend has."""
        s = self.context
        request = Request(
            s.device, s.dtype, s.channels_last, act, here=s.here, device_index=s.device_index
        )
        return select(primitive, (backend,), request)[0]

    def only_kernel(self, primitive: str, act: str) -> bool:
        """Whether the first backend that accepts a primitive has a kernel of its own for it."""
        found, _ = select(primitive, self.order, self._request(act))
        return found is not None and found.backend != "aten"

    def ask(
        self, primitive: str, *, acts: Sequence[str] = (), act: str = "none", **request: Any
    ) -> Implementation | None:
        """The first that accepts the request, with `act` or with each of `acts`."""
        asked, *more = [self._request(one, **request) for one in dict.fromkeys(acts or (act,))]
        found, reasons = select(primitive, self.order, asked, *more)
        self.declined += reasons
        if self.backend != "auto" and (found is None or found.backend != self.backend):
            self._insist(primitive, asked, reasons)
        return found

    def _insist(self, primitive: str, asked: Request, reasons: list[str]) -> None:
        """A backend asked for by name may leave a primitive out, but not decline a plain one."""
        own = list(implementations(primitive, self.backend))
        if own and not primitive.startswith(_MAY_DECLINE):
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
                f"no backend runs {primitive} on {self.context}: {'; '.join(self.declined)}"
            )
        return found


class _Site(NamedTuple):
    """A convolution in its block: its weight, and the activations in front of it and behind."""

    unit: Unit
    weight: Weight
    before: str
    after: str


def _options(choose: _Chooser, spec: Block) -> list[list[ConvPlan]]:
    acts = [unit.act for unit in spec.units]
    before, after = ["none", *acts[:-1], "none"], [*acts, spec.act]
    if spec.simple_end:
        after[len(acts) - 1] = spec.act
    return [
        []
        if weight is None
        else list(
            dict.fromkeys(_conv_plans(choose, spec, _Site(unit, weight, before[i], after[i])))
        )
        for i, (unit, weight) in enumerate(zip(spec.all_units, choose.context.weights, strict=True))
    ]


def _conv_plans(choose: _Chooser, spec: Block, site: _Site) -> Iterator[ConvPlan]:
    """The ways to run a convolution; several where it is to be measured which is fastest.

    Of a backend whose convolutions are not proven, "auto" only looks at those that fuse something.
    """
    plain = fusing = choose
    unproven = [n for n in choose.order if not BACKENDS[n].proven]
    if spec.backend == "auto" and unproven:
        proven = [n for n in choose.order if n not in unproven]
        plain, fusing = choose.among(proven), choose.among([*unproven, *proven])
    if spec.level != "auto":
        yield _plan_conv(fusing, plain, site, spec.level)
        return
    yield from (_plan_conv(plain, plain, site, n) for n in BACKENDS[plain.order[0]].levels)
    if fusing is not plain:
        levels = BACKENDS[unproven[0]].levels
        yield from (_plan_conv(fusing, plain, site, level) for level in levels)


def _plan_conv(fusing: _Chooser, plain: _Chooser, site: _Site, most: str) -> ConvPlan:
    """The implementations of a convolution at a level, or below where none goes so far.

    What fuses nothing into the convolution is asked of `plain`.
    """
    common: dict[str, Any] = {"conv": site.unit.conv, "weight": site.weight}
    rank = LEVELS.index(most)
    stats = prologue = joint = None
    if rank >= LEVELS.index("b'"):
        stats = fusing.ask("conv_forward", features=frozenset({"stats"}), **common)
    if rank >= LEVELS.index("c'"):
        both = frozenset({"stats", "prologue"})
        prologue = fusing.ask("conv_forward", features=both, act=site.before, **common)
        formed = frozenset() if most == "c" else frozenset({"grad_formed"})
        acts = (site.after, site.before)
        joint = fusing.ask("conv_backward", features=formed, acts=acts, **common)
    level = most if joint else "c'" if prologue else "b'" if stats else "b"
    return ConvPlan(
        level=level,
        forward=stats or plain("conv_forward", **common),
        prologue=prologue,
        stats=stats is not None,
        data=plain("conv_backward_data", **common),
        weight=plain("conv_backward_weight", **common),
        joint=joint,
        infer=(fusing if rank else plain)("conv_bn_act", act=site.after, **common),
    )
