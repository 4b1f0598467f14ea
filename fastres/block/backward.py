"""Runs a block backward: only what is needed, each gradient formed where it is consumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.block.compose import Formed, Pending, conv_backward, materialise
from fastres.block.forward import prepare
from fastres.block.plan import Plan
from fastres.block.spec import BlockSpec
from fastres.block.tensors import Saved, UnitNeeds, UnitTensors, pooled
from fastres.kernels import Branch, Gate, Gated, PendingGrad, Prologue, dense, memory_format_of


class Needs(NamedTuple):
    """Which gradients are wanted: of x, of a given residual, and per unit."""

    x: bool
    residual: bool
    units: tuple[UnitNeeds, ...]

    @classmethod
    def from_flags(cls, flags: Sequence[bool]) -> Needs:
        """From the operator's flat list: x, residual, then four per unit."""
        units = tuple(UnitNeeds(*flags[i : i + 4]) for i in range(2, len(flags), 4))
        return cls(flags[0], flags[1], units)


def run_backward(
    spec: BlockSpec,
    grad_out: Tensor,
    x: Tensor,
    units: Sequence[UnitTensors],
    saved: Sequence[Tensor],
    flags: Sequence[bool],
) -> list[Tensor]:
    """The wanted gradients, in the order of `flags`: x, residual, then four per unit."""
    plan, fmt = prepare(spec, x, units)
    kept = Saved.unflatten(spec, [u.weight is not None for u in units], saved)
    run = _Backward(spec, plan, dense(x, fmt), units, kept, Needs.from_flags(flags))
    run.run(dense(grad_out, fmt))
    return run.collect(memory_format_of(x))


#: The gradient of a unit's raw output: with what is pending on it, or formed.
Incoming = PendingGrad | Formed


class _Backward:
    """One backward run: walks the units from the block's end, filling in gradients."""

    def __init__(
        self,
        spec: BlockSpec,
        plan: Plan,
        x: Tensor,
        units: Sequence[UnitTensors],
        saved: Saved,
        needs: Needs,
    ) -> None:
        self.spec, self.plan, self.x, self.units = spec, plan, x, units
        self.saved, self.needs = saved, needs
        self.last = len(spec.units) - 1
        self.fmt = memory_format_of(x)
        self.grad_x: Tensor | None = None
        self.grad_residual: Tensor | None = None
        self.grad_weights: list[Tensor | None] = [None] * len(units)
        self.sums: list[Tensor | None] = [None] * len(units)

    # ------------------------------------------------------------ the walk

    def run(self, grad_out: Tensor) -> None:
        """Fill in every gradient that is wanted."""
        spec = self.spec
        gate = self._end_gate()
        self.end: Tensor | Gated = Gated(grad_out, gate)
        main = self._branch(self.last)
        side = self._branch(self.last + 1) if spec.shortcut == "projection" else None
        branches = (main,) if side is None else (main, side)
        if self._forms_end():
            formed = self._formed_end(grad_out, gate, branches)
        else:
            formed = self._pending_end(grad_out, gate, branches)
        # Given away one by one: each is as large as an activation, and of no use once it was used.
        if side is not None:
            self._projection(formed.pop())
        self._main_path(formed)

    def _pending_end(
        self, grad_out: Tensor, gate: Gate, branches: tuple[Branch, ...]
    ) -> list[Incoming]:
        """What each branch of the block's end is given: sums, and how the gradient is formed."""
        last, applied = self.last, gate.applied
        if any(self._wants_sums(last + i) for i in range(len(branches))):
            sums = self.plan.run("bn_act_backward_reduce", applied)(grad_out, gate, branches)
        else:
            sums = grad_out.new_empty(0)
        if self.spec.shortcut == "tensor" and self.needs.residual:
            self.grad_residual = self.plan.run("act_backward", applied)(grad_out, gate)
        return [
            PendingGrad(grad_out, gate, branch, _own_sums(sums, i), self._count(last + i))
            for i, branch in enumerate(branches)
        ]

    def _formed_end(
        self, grad_out: Tensor, gate: Gate, branches: tuple[Branch, ...]
    ) -> list[Incoming]:
        """The same gradients formed at once, and with them the residual's."""
        shortcut, needs = self.spec.shortcut, self.needs
        given = shortcut == "tensor" and needs.residual
        passes_on = shortcut == "identity" and needs.x and self._takes_formed_residual(gate)
        whole = self.plan.whole("bn_act_backward", gate.applied)
        assert whole is not None
        count = self._count(self.last)
        wanted = given or passes_on
        sums, grads, residual = whole(grad_out, gate, branches, count, want_residual=wanted)
        if given:
            self.grad_residual = residual
        elif passes_on:
            self.end = residual
        return [Formed(grad, _own_sums(sums, i)) for i, grad in enumerate(grads)]

    def _takes_formed_residual(self, gate: Gate) -> bool:
        """Whether the first convolution's data gradient is best added to g itself, held until then:
        not where memory is short, nor where its kernel forms g on the way in.
        """
        first = self.plan.convs[0]
        formed_there = first is not None and first.joint is not None
        return gate.applied != "none" and self.spec.memory != "lean" and not formed_there

    def _projection(self, incoming: Incoming) -> None:
        index = self.last + 1
        self.sums[index] = incoming.sums
        if not (self.needs.x or self.needs.units[index].weight):
            return
        source = Pending(pooled(self.spec, self.x, self.fmt))
        grad, _ = self._unit(index, incoming, source, self.needs.x, None, None)
        if grad is not None and self.spec.pool is not None:
            grad = _unpool(self.spec, grad, self.x)
        self.grad_x = grad

    def _main_path(self, given: list[Incoming]) -> None:
        for index in range(self.last, -1, -1):
            incoming = given.pop()
            self.sums[index] = incoming.sums
            below = self._below(index)
            if not (below or self.needs.units[index].weight):
                return
            if self.plan.convs[index] is None:
                self.grad_x = self._norm_alone(incoming)
                return
            branch = self._branch(index - 1) if index else None
            reduce = self._reduction(index - 1, branch) if branch else None
            accumulate = self._residual_gradient() if index == 0 and below else None
            grad, sums = self._unit(index, incoming, self._input(index), below, accumulate, reduce)
            del incoming
            if index == 0:
                self.grad_x = grad
            elif grad is None or branch is None:
                return
            else:
                given.append(self._inner(index - 1, grad, branch, sums))

    def _reduction(self, index: int, branch: Branch) -> tuple[Gate, Branch] | None:
        """The sums that the unit behind `index` is to deliver for it, if it is."""
        if not self._wants_sums(index) or self._forms(index):
            return None
        return self._inner_gate(index), branch

    def _inner(self, index: int, grad: Tensor, branch: Branch, sums: Tensor | None) -> Incoming:
        """What inner unit `index` is given, with `grad` the gradient of its activation."""
        gate, count = self._inner_gate(index), self._count(index)
        if not self._forms(index):
            sums = grad.new_empty(0) if sums is None else sums
            return PendingGrad(grad, gate, branch, sums, count)
        whole = self.plan.whole("bn_act_backward", gate.applied)
        assert whole is not None
        sums, (grad_y,), _ = whole(grad, gate, (branch,), count)
        return Formed(grad_y, sums)

    def _forms(self, index: int) -> bool:
        """Whether a unit's gradient is formed by the primitive that also sums: all of it is wanted,
        and no kernel of the convolution forms it on the way in.
        """
        act = self.spec.units[index].act if index < self.last else self.spec.act
        conv = self.plan.convs[index]
        wanted = self.needs.units[index].weight or (
            self.needs.x if index > self.last else self._below(index)
        )
        return (
            self.plan.whole("bn_act_backward", act) is not None
            and (conv is None or conv.joint is None)
            and self._wants_sums(index)
            and wanted
        )

    def _forms_end(self) -> bool:
        """Whether the gradients of all branches of the block's end are formed together."""
        ends = range(self.last, len(self.spec.all_units))
        counts = {self._count(index) for index in ends}
        return len(counts) == 1 and all(self._forms(index) for index in ends)

    def _unit(
        self,
        index: int,
        incoming: Incoming,
        source: Pending,
        want_x: bool,
        accumulate: Tensor | Gated | None,
        reduce: tuple[Gate, Branch] | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        conv, unit, tensors = self.plan.convs[index], self.spec.all_units[index], self.units[index]
        assert conv is not None and unit.conv is not None and tensors.weight is not None
        backward = conv.joint.run if conv.joint else conv_backward(self.plan, conv)
        grad_x, self.grad_weights[index], sums = backward(
            incoming,
            source.raw,
            tensors.weight,
            unit.conv,
            prologue=source.prologue,
            want_x=want_x,
            want_weight=self.needs.units[index].weight,
            accumulate=accumulate,
            reduce=reduce,
        )
        return grad_x, sums

    def _norm_alone(self, pending: Incoming) -> Tensor:
        if isinstance(pending, Formed):
            return pending.grad_y
        grads, _ = self.plan.run("bn_act_backward_apply", pending.gate.applied)(
            pending.grad_out,
            pending.gate,
            (pending.branch,),
            pending.sums,
            pending.values,
            want_grads=(True,),
        )
        return grads[0]

    # ------------------------------------------------------------ what it walks over

    def _end_gate(self) -> Gate:
        if self.spec.act == "none":
            return Gate("none")
        if self.spec.keeps_mask:
            return Gate("mask", self.saved.mask, self.spec.act)
        return Gate("affine", None, self.spec.act)

    def _inner_gate(self, index: int) -> Gate:
        act = self.spec.units[index].act
        return Gate("none") if act == "none" else Gate("affine", None, act)

    def _branch(self, index: int) -> Branch:
        stats = self.saved.stats[index]
        raw = self.saved.raw[index]
        if raw is None and self.plan.convs[index] is None:
            raw = self._input(index).raw
        elif raw is None:
            raw = self.saved.raw[index] = self._recompute(index)
        return Branch(raw, stats)

    def _recompute(self, index: int) -> Tensor:
        conv, unit, tensors = self.plan.convs[index], self.spec.all_units[index], self.units[index]
        assert conv is not None
        given = self._input(index)
        fused = given.prologue is not None and conv.prologue is not None
        implementation = conv.prologue if fused and conv.prologue else conv.forward
        if not fused:
            given = Pending(materialise(self.plan, given))
        raw, _ = implementation.run(
            given.raw, tensors.weight, tensors.bias, unit.conv, prologue=given.prologue
        )
        return raw

    def _input(self, index: int) -> Pending:
        """What unit `index` of the main path was given in forward."""
        if index == 0:
            return Pending(self.x)
        if self.spec.keeps_activated:
            activated = self.saved.activated[index - 1]
            assert activated is not None
            return Pending(activated)
        raw = self.saved.raw[index - 1]
        raw = self.x if raw is None else raw
        return Pending(raw, Prologue(self.saved.stats[index - 1], self.spec.units[index - 1].act))

    def _residual_gradient(self) -> Tensor | Gated | None:
        """What the first convolution's data gradient is added to."""
        if self.spec.shortcut == "projection":
            return self.grad_x
        if self.spec.shortcut == "identity":
            return self.end
        return None

    def _count(self, index: int) -> int:
        if not self.spec.all_units[index].batch_stats:
            return 0
        raw = self._branch(index).y
        assert raw is not None
        return raw.shape[0] * raw.shape[2] * raw.shape[3]

    # ------------------------------------------------------------ what is wanted

    def _below(self, index: int) -> bool:
        """Whether anything in front of unit `index` of the main path wants a gradient."""
        return self.needs.x or any(any(u) for u in self.needs.units[:index])

    def _wants_sums(self, index: int) -> bool:
        needs, unit = self.needs.units[index], self.spec.all_units[index]
        below = self.needs.x if index > self.last else self._below(index)
        return needs.affine or needs.bias or (unit.batch_stats and (below or needs.weight))

    def collect(self, fmt: torch.memory_format) -> list[Tensor]:
        """The wanted gradients, in the operator's order."""
        found: list[Tensor] = []
        if self.needs.x:
            assert self.grad_x is not None
            found.append(dense(self.grad_x, fmt))
        if self.needs.residual:
            assert self.grad_residual is not None
            found.append(self.grad_residual)
        for index, needs in enumerate(self.needs.units):
            found += self._unit_gradients(index, needs)
        return found

    def _unit_gradients(self, index: int, needs: UnitNeeds) -> list[Tensor]:
        tensors, found = self.units[index], []
        if needs.weight:
            grad = self.grad_weights[index]
            assert grad is not None and tensors.weight is not None
            found.append(dense(grad, memory_format_of(tensors.weight)))
        if needs.bias:
            assert tensors.bias is not None
            found.append(self._bias_gradient(index).to(tensors.bias.dtype))
        if needs.norm_weight:
            assert tensors.norm_weight is not None
            found.append(self._sum(index, None).to(tensors.norm_weight.dtype, copy=True))
        if needs.norm_bias:
            assert tensors.norm_bias is not None
            found.append(self._sum(index, 0).to(tensors.norm_bias.dtype, copy=True))
        return found

    def _sum(self, index: int, row: int | None) -> Tensor:
        """A row of the unit's sums: a view, which parameters must not share as their gradient."""
        sums = self.sums[index]
        assert sums is not None
        return sums[1 if row is None else row]

    def _bias_gradient(self, index: int) -> Tensor:
        """A convolution's bias in front of batch statistics cancels: its gradient is zero."""
        sum_g = self._sum(index, 0)
        if self.spec.all_units[index].batch_stats:
            return torch.zeros_like(sum_g)
        return sum_g * self.saved.stats[index][3]


def _own_sums(sums: Tensor, branch: int) -> Tensor:
    """`sums` with the row of one branch's own sum_gx in front of the other's."""
    if branch == 0 or not sums.numel():
        return sums
    return torch.stack([sums[0], sums[2], sums[1]])


def _unpool(spec: BlockSpec, grad: Tensor, x: Tensor) -> Tensor:
    p = spec.pool
    assert p is not None
    return torch.ops.aten.avg_pool2d_backward(
        grad, x, p.kernel, p.stride, p.padding, p.ceil_mode, p.count_include_pad, None
    )
