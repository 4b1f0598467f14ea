"""Runs a block forward: convolutions, statistics, and one pass at the block's end.

Between convolutions an activation travels raw, with its scale, shift and activation pending. A
convolution with a prologue takes it so; for any other it is formed first. Levels mix freely.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.engine.autotune import tuned_plan
from fastres.engine.compose import Pending, convolve
from fastres.engine.plan import Plan, make_plan, signature_of
from fastres.engine.spec import BlockSpec, UnitSpec
from fastres.engine.tensors import Saved, UnitTensors, keeps_raw, pooled
from fastres.primitives import Prologue, acc_dtype, dense, memory_format_of


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
        self.saved = Saved()

    def run(self, x: Tensor, residual: Tensor | None) -> list[Tensor]:
        spec = self.spec
        end = self._main_path(x)
        residual_stats = None
        if spec.shortcut == "identity":
            residual = x
        elif spec.shortcut == "projection":
            residual, prologue = self._unit(
                len(spec.units), Pending(pooled(spec, x, memory_format_of(x)))
            )
            residual_stats = prologue.stats
        assert end.prologue is not None
        out, self.saved.mask = self.plan.run("scale_shift_act", spec.act)(
            end.raw,
            end.prologue.stats,
            residual=residual,
            residual_stats=residual_stats,
            act=spec.act,
            want_mask=spec.keeps_mask,
        )
        return [out, *self.saved.flatten()]

    def _main_path(self, x: Tensor) -> Pending:
        current = Pending(x)
        for i in range(len(self.spec.units)):
            raw, prologue = self._unit(i, current)
            current = Pending(raw, prologue)
        return current

    def _unit(self, index: int, given: Pending) -> tuple[Tensor, Prologue]:
        """Convolution and statistics of one unit: its raw output, and what is pending on it."""
        unit, tensors = self.spec.all_units[index], self.units[index]
        conv = self.plan.convs[index]
        if conv is None:
            raw, state = given.raw, None
        else:
            keep = self.spec.keeps_activated
            raw, state, z = convolve(self.plan, conv, unit, tensors[:2], given, keep)
            if keep and z is not None:
                self.saved.activated.append(z)
        if unit.batch_stats and state is None:
            state = self.plan.run("channel_stats")(raw)
        stats = finalize(self.plan, unit, tensors, raw, state)
        self.saved.stats.append(stats)
        keep = conv is not None and keeps_raw(self.spec, index)
        self.saved.raw.append(raw if keep else None)
        return raw, Prologue(stats, unit.act)


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
