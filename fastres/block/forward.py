"""Runs a block forward: convolutions, statistics, and one pass at the block's end.

Between convolutions an activation travels raw, with its scale, shift and activation pending. A
convolution with a prologue takes it so; for any other it is formed first. Levels mix freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.block.autotune import tuned_plan
from fastres.block.compose import Pending, convolve
from fastres.block.plan import Plan, make_plan, signature_of
from fastres.block.spec import BlockSpec, UnitSpec
from fastres.block.tensors import Saved, UnitTensors, keeps_raw, pooled
from fastres.kernels import Prologue, acc_dtype, dense, memory_format_of


def prepare(
    spec: BlockSpec, x: Tensor, units: Sequence[UnitTensors]
) -> tuple[Plan, torch.memory_format]:
    """The plan and the layout that a block uses for these inputs."""
    weights = [u.weight for u in units]
    fmt = memory_format_of(x, weights)
    signature = signature_of(x, weights, fmt == torch.channels_last)
    plan = make_plan(spec, signature)
    if x.device.type == "cuda" and spec.level == "auto" and x.numel() > 0:
        plan = tuned_plan(spec, signature, plan, x)
    return plan, fmt


def run_forward(
    spec: BlockSpec, x: Tensor, residual: Tensor | None, units: Sequence[UnitTensors]
) -> list[Tensor]:
    """[out, stats per unit, what backward needs]; see `tensors.output_metas` for the shapes."""
    plan, fmt = prepare(spec, x, units)
    x = dense(x, fmt)
    residual = None if residual is None else dense(residual, fmt)
    if not spec.save and not spec.batch_stats:
        return _run_inference(spec, plan, x, residual, units)
    return _Forward(spec, plan, units).run(x, residual)


class _Forward:
    """One forward run of a block that normalises with batch statistics or keeps for backward."""

    def __init__(self, spec: BlockSpec, plan: Plan, units: Sequence[UnitTensors]) -> None:
        self.spec, self.plan, self.units = spec, plan, units
        self.last = len(spec.units) - 1
        self.saved = Saved()
        self.stats: dict[int, Tensor] = {}
        self.raw: dict[int, Tensor | None] = {}

    def run(self, x: Tensor, residual: Tensor | None) -> list[Tensor]:
        spec = self.spec
        current = Pending(x)
        for i in range(self.last):
            raw, state = self._convolve(i, current)
            current = self._normalised(i, raw, state)
        raw, state = self._convolve(self.last, current)
        del current  # an activation that nobody reads any more
        residual_stats = None
        if spec.shortcut == "identity":
            residual = x
        elif spec.shortcut == "projection":
            source = Pending(pooled(spec, x, memory_format_of(x)))
            residual, own_state = self._convolve(self.last + 1, source)
            residual_stats = self._finalize(self.last + 1, residual, own_state)
        out = self._end(raw, state, residual, residual_stats)
        units = range(len(spec.all_units))
        self.saved.stats = [self.stats[i] for i in units]
        self.saved.raw = [self.raw[i] for i in units]
        return [out, *self.saved.flatten()]

    def _end(
        self, raw: Tensor, state: Tensor | None, residual: Tensor | None,
        residual_stats: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The block's output, out of what its last convolution and its shortcut left."""
        act = self.spec.act
        end: dict[str, Any] = {
            "residual": residual,
            "residual_stats": residual_stats,
            "act": act,
            "want_mask": self.spec.keeps_mask,
        }
        whole = self._whole(self.last, state, act)
        if whole is not None:
            self.stats[self.last], out, self.saved.mask = whole(raw, **end)
            return out
        stats = self._finalize(self.last, raw, state)
        out, self.saved.mask = self.plan.run("scale_shift_act", act)(raw, stats, **end)
        return out

    def _convolve(self, index: int, given: Pending) -> tuple[Tensor, Tensor | None]:
        """One unit's raw output, and the state of that where the convolution delivers it."""
        unit, tensors = self.spec.all_units[index], self.units[index]
        conv = self.plan.convs[index]
        if conv is None:
            self.raw[index] = None
            return given.raw, None
        keep = self.spec.keeps_activated
        raw, state, z = convolve(self.plan, conv, unit, tensors[:2], given, keep)
        if keep and z is not None:
            self.saved.activated.append(z)
        self.raw[index] = raw if keeps_raw(self.spec, index) else None
        return raw, state

    def _normalised(self, index: int, raw: Tensor, state: Tensor | None) -> Pending:
        """What is pending on an inner unit's output; formed where the next convolution needs it."""
        act = self.spec.units[index].act
        following = self.plan.convs[index + 1]
        forms = self.spec.keeps_activated or following is None or following.prologue is None
        whole = self._whole(index, state, act) if forms else None
        if whole is None:
            return Pending(raw, Prologue(self._finalize(index, raw, state), act))
        stats, formed, _ = whole(raw, act=act)
        self.stats[index] = stats
        return Pending(raw, Prologue(stats, act), formed)

    def _whole(self, index: int, state: Tensor | None, act: str) -> Callable[..., Any] | None:
        """Statistics and normalisation of a unit in one, where the convolution left them undone."""
        unit, tensors = self.spec.all_units[index], self.units[index]
        if state is not None or not unit.batch_stats:
            return None
        found = self.plan.whole("bn_act_forward", act)
        if found is None:
            return None
        return lambda raw, **more: found(
            raw, tensors.norm_weight, tensors.norm_bias, unit.eps, **more
        )

    def _finalize(self, index: int, raw: Tensor, state: Tensor | None) -> Tensor:
        unit = self.spec.all_units[index]
        if unit.batch_stats and state is None:
            state = self.plan.run("channel_stats")(raw)
        stats = finalize(self.plan, unit, self.units[index], raw, state)
        self.stats[index] = stats
        return stats


def finalize(
    plan: Plan, unit: UnitSpec, tensors: UnitTensors, raw: Tensor, state: Tensor | None
) -> Tensor:
    """`stats` [5, C] of a unit, from batch statistics or from its running ones."""
    running = None
    if not unit.batch_stats:
        assert tensors.running_mean is not None and tensors.running_var is not None
        running = (tensors.running_mean, tensors.running_var)
    count = raw.shape[0] * raw.shape[2] * raw.shape[3]
    return plan.run("finalize_stats")(
        state,
        count,
        running,
        tensors.norm_weight,
        tensors.norm_bias,
        unit.eps,
        acc=acc_dtype(raw.dtype),
    )


def _run_inference(
    spec: BlockSpec,
    plan: Plan,
    x: Tensor,
    residual: Tensor | None,
    units: Sequence[UnitTensors],
) -> list[Tensor]:
    """Running statistics and no backward: batch norm folds into each convolution."""
    stats = [
        finalize(plan, unit, tensors, x, None)
        for unit, tensors in zip(spec.all_units, units, strict=True)
    ]
    last = len(spec.units) - 1
    if spec.shortcut == "identity":
        residual = x
    elif spec.shortcut == "projection":
        source = pooled(spec, x, memory_format_of(x))
        residual = _infer_unit(spec, plan, units, stats, last + 1, source, None, "none")
    z = x
    for i, unit in enumerate(spec.units):
        ends = i == last
        z = _infer_unit(
            spec,
            plan,
            units,
            stats,
            i,
            z,
            residual if ends else None,
            spec.act if ends else unit.act,
        )
    return [z, *stats]


def _infer_unit(
    spec: BlockSpec,
    plan: Plan,
    units: Sequence[UnitTensors],
    stats: Sequence[Tensor],
    index: int,
    x: Tensor,
    residual: Tensor | None,
    act: str,
) -> Tensor:
    conv, tensors = plan.convs[index], units[index]
    if conv is None:
        out, _ = plan.run("scale_shift_act", act)(x, stats[index], residual=residual, act=act)
        return out
    return conv.infer.run(
        x,
        tensors.weight,
        tensors.bias,
        spec.all_units[index].conv,
        stats[index],
        residual=residual,
        act=act,
    )
