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
from fastres.block.compose import convolve, end_of, materialise, scaled
from fastres.block.plan import Plan, context_of, make_plan
from fastres.block.spec import Block, Unit
from fastres.block.tensors import Act, Saved, UnitTensors, identity_stats, pooled
from fastres.kernels import acc_dtype, dense, memory_format_of


def plan_of(block: Block, x: Tensor, weights: Sequence[Tensor | None]) -> Plan:
    """The plan that a block uses for these inputs."""
    context = context_of(x, weights, memory_format_of(x, weights) == torch.channels_last)
    plan = make_plan(block, context)
    if x.device.type == "cuda" and block.level == "auto" and x.numel() > 0:
        plan = tuned_plan(block, context, plan, x)
    return plan


def run_forward(
    block: Block,
    x: Tensor,
    residual: Tensor | None,
    units: Sequence[UnitTensors],
    plan: Plan | None = None,
    fmt: torch.memory_format | None = None,
) -> list[Tensor]:
    """[out, statistics of each unit with a norm, what backward needs]; shapes as `output_metas`.

    With an open end, out is the last raw output, and the mean of what it stands for, [N, C],
    comes next. `plan` and `fmt` are found where they are not given.
    """
    if plan is None or fmt is None:
        weights = [u.weight for u in units]
        plan, fmt = plan_of(block, x, weights), memory_format_of(x, weights)
    x = dense(x, fmt)
    residual = None if residual is None else dense(residual, fmt)
    if not (block.save or block.batch_stats or block.open_end):
        return _Inference(block, plan, units, fmt).run(x, residual)
    return _Forward(block, plan, units, fmt).run(x, residual)


class _Walk:
    """One forward run over the units of a block."""

    def __init__(
        self, block: Block, plan: Plan, units: Sequence[UnitTensors], fmt: torch.memory_format
    ) -> None:
        self.block, self.plan, self.units, self.fmt = block, plan, units, fmt
        self.specs = block.all_units
        self.last = len(block.units) - 1
        self.saved = Saved()
        self.saved.stats = [None] * len(self.specs)

    def _finalize(self, index: int, raw: Tensor, state: Tensor | None) -> Tensor | None:
        """Statistics of a unit's norm, where it has one."""
        unit = self.specs[index]
        if unit.norm is None:
            return None
        if unit.batch_stats and state is None:
            state = self.plan.run("channel_stats")(raw)
        stats = finalize(self.plan, unit, self.units[index], raw, state)
        self.saved.stats[index] = stats
        return stats


class _Forward(_Walk):
    """A run that normalises with batch statistics or keeps something for backward."""

    def run(self, x: Tensor, residual: Tensor | None) -> list[Tensor]:
        block = self.block
        self.saved.raw = [None] * len(self.specs)
        current, source = Act(x), x
        for i in range(self.last):
            raw, state = self._convolve(i, current)
            current = self._normalised(i, raw, state)
            if i == 0 and block.shortcut == "activated":
                source = materialise(self.plan, current)
                current = current._replace(value=source)
        raw, state = self._convolve(self.last, current)
        del current  # An activation that nobody reads any more.
        if block.open_end:
            return self._open(raw, state)
        residual_stats = None
        if block.projection is not None:
            source = pooled(block, source, self.fmt)
            residual, own_state = self._convolve(self.last + 1, Act(source))
            residual_stats = self._finalize(self.last + 1, residual, own_state)
        elif block.shortcut in ("input", "activated"):
            residual = source
        out = self._end(raw, state, residual, residual_stats)
        return [out, *self.saved.flatten()]

    def _end(
        self, raw: Tensor, state: Tensor | None, residual: Tensor | None,
        residual_stats: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The block's output, out of what its last convolution and its shortcut left."""
        block = self.block
        if block.simple_end and (whole := self._whole(self.last, state, block.act)) is not None:
            self.saved.stats[self.last], out, self.saved.mask = whole(
                raw, residual=residual, residual_stats=residual_stats, act=block.act,
                want_mask=block.keeps_mask,
            )  # fmt: skip
            return out
        stats = self._finalize(self.last, raw, state)
        if not block.simple_end:
            unit, factor = self.specs[self.last], self.units[self.last].factor
            raw, stats = materialise(self.plan, Act(raw, stats, unit.act, factor)), None
        out, self.saved.mask = end_of(
            self.plan, block, raw, stats, residual, residual_stats, block.keeps_mask
        )
        return out

    def _open(self, raw: Tensor, state: Tensor | None) -> list[Tensor]:
        """The raw output, and the mean over each image of what it stands for: the mean of an affine
        function is the function of the mean.
        """
        stats = self._finalize(self.last, raw, state)
        mean = raw.mean((2, 3), dtype=acc_dtype(raw.dtype))
        if stats is not None:
            mean = mean * stats[3] + stats[4]
        return [raw, mean, *self.saved.flatten()]

    def _convolve(self, index: int, given: Act) -> tuple[Tensor, Tensor | None]:
        """One unit's raw output, and the state of that where the convolution delivers it."""
        tensors, conv = self.units[index], self.plan.convs[index]
        keep = 0 < index <= self.last and self.block.keeps_value[index - 1]
        if conv is None:
            raw = materialise(self.plan, given)
            if keep:
                self.saved.activated.append(raw)
            return raw, None
        raw, state, z = convolve(self.plan, conv, self.specs[index], tensors[:2], given, keep)
        if keep:
            self.saved.activated.append(z)
        if self.block.keeps_raw[index]:
            self.saved.raw[index] = raw
        return raw, state

    def _normalised(self, index: int, raw: Tensor, state: Tensor | None) -> Act:
        """What is pending on an inner unit's output; formed where the next convolution needs it."""
        unit, factor = self.specs[index], self.units[index].factor
        following = self.plan.convs[index + 1]
        forms = self.block.keeps_activated or following is None or following.prologue is None
        whole = self._whole(index, state, unit.act) if forms else None
        if whole is None:
            return Act(raw, self._finalize(index, raw, state), unit.act, factor)
        stats, formed, _ = whole(raw, act=unit.act)
        self.saved.stats[index] = stats
        return Act(
            raw, stats, unit.act, factor, formed if factor is None else scaled(formed, factor)
        )

    def _whole(self, index: int, state: Tensor | None, act: str) -> Callable[..., Any] | None:
        """Statistics and normalisation of a unit in one, where the convolution left them undone."""
        unit, tensors = self.specs[index], self.units[index]
        if state is not None or unit.norm is None or not unit.batch_stats:
            return None
        composite = self.plan.whole("bn_act_forward", act)
        if composite is None:
            return None
        eps = unit.norm.eps
        return lambda raw, **more: composite(
            raw, tensors.norm_weight, tensors.norm_bias, eps, **more
        )


def finalize(
    plan: Plan, unit: Unit, tensors: UnitTensors, raw: Tensor, state: Tensor | None
) -> Tensor:
    """`stats` [5, C] of a unit's norm: from the batch, from its running ones, or as given."""
    assert unit.norm is not None
    running = None
    if not unit.batch_stats:
        assert tensors.running_mean is not None
        if unit.norm.source == "given":
            return tensors.running_mean.clone()
        assert tensors.running_var is not None
        running = (tensors.running_mean, tensors.running_var)
    count = raw.shape[0] * raw.shape[2] * raw.shape[3]
    return plan.run("finalize_stats")(
        state, count, running, tensors.norm_weight, tensors.norm_bias, unit.norm.eps,
        acc=acc_dtype(raw.dtype),
    )  # fmt: skip


class _Inference(_Walk):
    """Running statistics and no backward: batch norm folds into each convolution."""

    def run(self, x: Tensor, residual: Tensor | None) -> list[Tensor]:
        block = self.block
        simple = block.simple_end
        z = source = x
        if self.last == 0:
            residual = self._shortcut(source, residual)
        for i in range(self.last):
            z = self._unit(i, z, None, block.units[i].act)
            if i == 0 and block.shortcut == "activated":
                source = z
            if i == self.last - 1:
                residual = self._shortcut(source, residual)
        end = block.act if simple else block.units[-1].act
        out = self._unit(self.last, z, residual if simple else None, end)
        if not simple and (residual is not None or block.act != "none"):
            stats, act = identity_stats(out), block.act
            out, _ = self.plan.run("scale_shift_act", act)(out, stats, residual=residual, act=act)
        return [out, *self.saved.flatten()]

    def _shortcut(self, source: Tensor, residual: Tensor | None) -> Tensor | None:
        block = self.block
        if block.projection is not None:
            return self._unit(self.last + 1, pooled(block, source, self.fmt), None, "none")
        return source if block.shortcut in ("input", "activated") else residual

    def _unit(self, index: int, x: Tensor, residual: Tensor | None, act: str) -> Tensor:
        unit, tensors, conv = self.specs[index], self.units[index], self.plan.convs[index]
        stats = self._finalize(index, x, None)
        if conv is None:
            out = x
            if stats is not None or residual is not None or act != "none":
                known = identity_stats(x) if stats is None else stats
                out, _ = self.plan.run("scale_shift_act", act)(x, known, residual=residual, act=act)
        else:
            assert tensors.weight is not None
            out = self._infer(index, x, tensors.weight, stats, residual, act)
        return out if tensors.factor is None or not unit.scale else scaled(out, tensors.factor)

    def _infer(
        self, index: int, x: Tensor, weight: Tensor, stats: Tensor | None,
        residual: Tensor | None, act: str,
    ) -> Tensor:  # fmt: skip
        conv, unit, bias = self.plan.convs[index], self.specs[index].conv, self.units[index].bias
        assert conv is not None
        if stats is None and residual is None and act == "none":
            return conv.forward.run(x, weight, bias, unit)[0]
        if stats is None:
            stats = _plain_stats(weight, acc_dtype(x.dtype))
        return conv.infer.run(x, weight, bias, unit, stats, residual=residual, act=act)


def _plain_stats(weight: Tensor, acc: torch.dtype) -> Tensor:
    """Statistics that leave a convolution's output as it is."""
    return identity_stats(weight.new_empty(1, weight.shape[0], 0, 0, dtype=acc))
