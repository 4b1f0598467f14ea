"""Runs a block backward: only what is needed, each gradient formed where it is consumed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.block.compose import conv_backward, form, materialise, scaled
from fastres.block.forward import plan_of
from fastres.block.plan import Plan
from fastres.block.spec import Block
from fastres.block.tensors import (
    Act,
    Saved,
    UnitTensors,
    identity_stats,
    output_shapes,
    pooled,
)
from fastres.kernels import (
    Branch,
    Gate,
    Gated,
    PendingGrad,
    acc_dtype,
    activation,
    dense,
    memory_format_of,
)

_OPEN = Gate("none")
#: Of a norm's parameters and running statistics a backward reads none: `stats` hold what it needs.
_NORM_READS = (False, False, False, False)


class UnitNeeds(NamedTuple):
    """Which of a unit's tensors want a gradient."""

    weight: bool
    bias: bool
    norm_weight: bool
    norm_bias: bool
    factor: bool

    @property
    def affine(self) -> bool:
        """Whether the sums are needed for the batch norm's own parameters."""
        return self.norm_weight or self.norm_bias


class _NeedsFields(NamedTuple):
    block: Block
    x: bool
    residual: bool
    units: tuple[UnitNeeds, ...]


#: How many of a unit's tensors may want a gradient.
UNIT_NEEDS = len(UnitNeeds._fields)


class Needs(_NeedsFields):
    """Which gradients are wanted: of x, of a given residual, and per unit; and what follows."""

    @cached_property
    def below(self) -> tuple[bool, ...]:
        """Whether anything in front of a unit wants a gradient; for a projection, its source."""
        any_unit = [any(unit) for unit in self.units]
        main = len(self.block.units)
        wanted = [self.x or any(any_unit[:index]) for index in range(main)]
        source = wanted[1] if self.block.shortcut == "activated" else self.x
        return (*wanted, source)

    @cached_property
    def sums(self) -> tuple[bool, ...]:
        """Whether a unit's sums are needed."""
        units = zip(self.units, self.block.all_units, self.below, strict=False)
        return tuple(
            [
                own.affine or own.bias or (unit.batch_stats and (below or own.weight))
                for own, unit, below in units
            ]
        )

    @cached_property
    def passes(self) -> tuple[bool, ...]:
        """Whether the gradient of a unit's raw output is needed."""
        return tuple(
            [own.weight or below for own, below in zip(self.units, self.below, strict=False)]
        )

    @cached_property
    def reads(self) -> tuple[bool, ...]:
        """Whether backward reads the values of x, and of each of its units' tensors.

        Those of a weight are read for the gradient of what is in front of it, not for its own.
        """
        found = [self._reads_x]
        for i, unit in enumerate(self.block.all_units):
            again = self.block.recomputed[i] and (self.below[i] or any(self.units[i]))
            weight = unit.conv is not None and (self.below[i] or again)
            found += [weight, again, *_NORM_READS, unit.scale]
        return tuple(found)

    @property
    def _reads_x(self) -> bool:
        """A convolution's input is read where a gradient passes it; a leading norm's for its own
        gradients, and wherever its output is to be computed again.
        """
        side = self._reads_side
        if self.block.units[0].conv is not None:
            return self.passes[0] or side
        return side or self._reads_raw(0)

    @cached_property
    def unread(self) -> tuple[int, ...]:
        """The units whose raw output backward does not read."""
        return tuple([i for i in range(len(self.units)) if not self._reads_raw(i)])

    @cached_property
    def unread_values(self) -> tuple[int, ...]:
        """The units whose activated output backward does not read."""
        return tuple([i for i in range(len(self.block.units) - 1) if not self._goes_on(i)])

    def _reads_raw(self, index: int) -> bool:
        own = (self.below[index] or any(self.units[index])) and self._tells_gradient(index)
        if own or index + 1 >= len(self.block.units):
            return own
        return not self.block.keeps_value[index] and self._goes_on(index)

    def _tells_gradient(self, index: int) -> bool:
        """Whether the raw output of a unit is read for the gradient of what it gives: for its
        norm's share, or the derivative of an activation that neither bits nor output tell.
        """
        block, unit, own = self.block, self.block.all_units[index], self.units[index]
        last = len(block.units) - 1
        if unit.batch_stats or own.norm_weight or own.factor:
            return True
        if index == last and block.max_pool is not None:
            return True
        if index == last and block.simple_end:
            return block.shortcut == "none" and activation(block.act).gate is None
        known = index < last and block.keeps_value[index] and not unit.scale
        return unit.act != "none" and not (known and activation(unit.act).gate is not None)

    def _goes_on(self, index: int) -> bool:
        """Whether what an inner unit gave is read as the input of what comes next."""
        block, following = self.block, index + 1
        if block.units[following].conv is None:
            return self.passes[following] or self._reads_raw(following)
        shortcut = index == 0 and block.shortcut == "activated" and self._reads_side
        again = block.recomputed[following] and self._reads_raw(following)
        return self.passes[following] or shortcut or again

    @property
    def _reads_side(self) -> bool:
        """Whether what a projection is given is read."""
        side = self.passes[-1] or self.block.recomputed[-1]
        return self.block.projection is not None and side


def needs_of(block: Block, flags: tuple[bool, ...]) -> Needs:
    """From the operator's flat list: x, residual, then five per unit."""
    rest = range(2, len(flags), UNIT_NEEDS)
    units = tuple([UnitNeeds(*flags[i : i + UNIT_NEEDS]) for i in rest])
    return Needs(block, flags[0], flags[1], units)


needs_once = lru_cache(maxsize=4096)(needs_of)


def run_backward(
    block: Block,
    grad_out: Tensor,
    grad_mean: Tensor | None,
    x: Tensor,
    units: Sequence[UnitTensors],
    saved: Sequence[Tensor],
    flags: Sequence[bool],
    plan: Plan | None = None,
    fmt: torch.memory_format | None = None,
) -> list[Tensor]:
    """The wanted gradients, in the order of `flags`: x, residual, then five per unit.

    Those of 1-d tensors have the dtype of the statistics. With an open end `grad_out` is the
    gradient of the normalised output, and `grad_mean` that of its mean over each image.
    """
    if plan is None or fmt is None:
        weights = [u.weight for u in units]
        plan, fmt = plan_of(block, x, weights), memory_format_of(x, weights)
    kept = Saved.unflatten(block, saved)
    run = _Backward(block, plan, dense(x, fmt), units, kept, needs_once(block, tuple(flags)), fmt)
    grad_out = dense(grad_out, fmt)
    if grad_mean is not None:
        pixels = grad_out.shape[2] * grad_out.shape[3]
        grad_out = grad_out + (grad_mean / pixels).to(grad_out.dtype)[:, :, None, None]
    run.run(grad_out)
    return run.collect(memory_format_of(x))


class _Backward:
    """One backward run: walks the units from the block's end, filling in gradients."""

    def __init__(
        self,
        block: Block,
        plan: Plan,
        x: Tensor,
        units: Sequence[UnitTensors],
        saved: Saved,
        needs: Needs,
        fmt: torch.memory_format,
    ) -> None:
        self.block, self.plan, self.x, self.units = block, plan, x, units
        self.saved, self.needs = saved, needs
        self.specs = block.all_units
        self.last = len(block.units) - 1
        self.fmt, self.acc = fmt, acc_dtype(x.dtype)
        self.end: Tensor | Gated | None = None
        self.grad_x: Tensor | None = None
        self.grad_residual: Tensor | None = None
        self.grad_weights: list[Tensor | None] = [None] * len(units)
        self.grad_factors: list[Tensor | None] = [None] * len(units)
        self.sums: list[Tensor | None] = [None] * len(units)

    # ------------------------------------------------------------ the walk

    def run(self, grad_out: Tensor) -> None:
        """Fill in every gradient that is wanted."""
        self.grad_out = grad_out
        grad_out = self._behind_pooling(grad_out)
        gate = self._end_gate()
        if self.block.simple_end:
            grads = self._simple_end(grad_out, gate)
        else:
            grads = self._scaled_end(grad_out, gate)
        # Given away one by one: each is as large as an activation, and of no use once it was used.
        if self.block.projection is not None:
            self._projection(grads.pop())
        self._main_path(grads)

    def _behind_pooling(self, grad_out: Tensor) -> Tensor:
        """The gradient of what was pooled, where the block ends with that."""
        pool = self.block.max_pool
        if pool is None:
            return grad_out
        weights = [None if u.weight is None else (*u.weight.shape,) for u in self.units]
        size = output_shapes(self.block, self.x.shape, weights)[self.last][2:]
        backward = self.plan.run("max_pool_backward")
        return backward(grad_out, self.saved.argmax, pool, size)  # type: ignore[no-any-return]

    def _simple_end(self, grad_out: Tensor, gate: Gate) -> list[PendingGrad]:
        """Both branches of the block's end in one, as nothing stands in front of the sum."""
        self.end = Gated(grad_out, gate)
        main = self._branch(self.last)
        branches: tuple[Branch, ...] = (main,)
        if self.block.projection is not None:
            branches = (main, self._branch(self.last + 1))
        if self._forms_end():
            return self._formed_end(grad_out, gate, branches)
        return self._pending_end(grad_out, gate, branches)

    def _pending_end(
        self, grad_out: Tensor, gate: Gate, branches: tuple[Branch, ...]
    ) -> list[PendingGrad]:
        """What each branch of the block's end is given: sums, and how the gradient is formed."""
        last, applied = self.last, gate.applied
        if any([self.needs.sums[last + i] for i in range(len(branches))]):
            sums = self.plan.run("bn_act_backward_reduce", applied)(grad_out, gate, branches)
        else:
            sums = grad_out.new_empty(0)
        if self.block.shortcut == "tensor" and self.needs.residual:
            self.grad_residual = self._through_gate(grad_out, gate)
        return [
            self._pending(last + i, grad_out, gate, branch, _own_sums(sums, i))
            for i, branch in enumerate(branches)
        ]

    def _formed_end(
        self, grad_out: Tensor, gate: Gate, branches: tuple[Branch, ...]
    ) -> list[PendingGrad]:
        """The same gradients formed at once, and with them the residual's."""
        shortcut, needs = self.block.shortcut, self.needs
        given = shortcut == "tensor" and needs.residual
        passes_on = (
            shortcut == "input" and self.block.projection is None and needs.x
            and self._takes_formed_residual(gate)
        )  # fmt: skip
        whole = self.plan.whole("bn_act_backward", gate.applied)
        assert whole is not None
        count = self._count(self.last)
        wanted = given or passes_on
        sums, grads, residual = whole(grad_out, gate, branches, count, want_residual=wanted)
        if given:
            self.grad_residual = residual
        elif passes_on:
            self.end = residual
        return [
            PendingGrad(grad_out, gate, branches[i], _own_sums(sums, i), count, grad)
            for i, grad in enumerate(grads)
        ]

    def _takes_formed_residual(self, gate: Gate) -> bool:
        """Whether the first convolution's data gradient is best added to g itself, held until then:
        not where memory is short, nor where its kernel forms g on the way in.
        """
        first = self.plan.convs[0]
        formed_there = first is not None and first.joint is not None
        return gate.applied != "none" and self.block.memory != "lean" and not formed_there

    def _scaled_end(self, grad_out: Tensor, gate: Gate) -> list[PendingGrad]:
        """The end of a block whose last unit activates or scales in front of the sum."""
        g = self._through_gate(grad_out, gate)
        self.end = Gated(g, _OPEN)
        if self.block.shortcut == "tensor" and self.needs.residual:
            self.grad_residual = g
        grads = [self._through_unit(self.last, g)]
        if self.block.projection is not None:
            grads.append(self._through_unit(self.last + 1, g))
        return grads

    def _through_gate(self, grad_out: Tensor, gate: Gate) -> Tensor:
        if gate.applied == "none":
            return grad_out
        return self.plan.run("act_backward", gate.applied)(grad_out, gate)

    def _through_unit(self, index: int, grad: Tensor, sums: Tensor | None = None) -> PendingGrad:
        """What the convolution of unit `index` is given, with `grad` that of the unit's output."""
        unit, factor = self.specs[index], self.units[index].factor
        if unit.scale:
            assert factor is not None
            if self.needs.units[index].factor:
                self.grad_factors[index] = self._factor_gradient(index, grad, factor)
            grad = scaled(grad, factor)
        gate, branch = self._inner_gate(index), self._branch(index)
        conv = self.plan.convs[index]
        if gate.kind == "out" and conv is not None and conv.joint is not None:
            # A kernel that forms the gradient on the way in knows bits, or the raw output.
            grad, gate = self._through_gate(grad, gate), _OPEN
        if self._forms(index):
            whole = self.plan.whole("bn_act_backward", gate.applied)
            assert whole is not None
            count = self._count(index)
            sums, (grad_y,), _ = whole(grad, gate, (branch,), count)
            return PendingGrad(grad, gate, branch, sums, count, grad_y)
        if sums is None and self.needs.sums[index]:
            sums = self.plan.run("bn_act_backward_reduce", gate.applied)(grad, gate, (branch,))
        sums = grad.new_empty(0) if sums is None else sums
        return self._pending(index, grad, gate, branch, sums)

    def _pending(
        self, index: int, grad: Tensor, gate: Gate, branch: Branch, sums: Tensor
    ) -> PendingGrad:
        """A gradient to be formed where it is consumed; where nothing has to be, formed already."""
        plain = gate.applied == "none" and not self.specs[index].scaled_norm
        value = grad if plain else None
        return PendingGrad(grad, gate, branch, sums, self._count(index), value)

    def _factor_gradient(self, index: int, grad: Tensor, factor: Tensor) -> Tensor:
        """sum(grad * z) over what the factor was spread over, z being what it multiplied."""
        small = factor.shape[0] == grad.shape[0] and factor.shape[2:] == (1, 1)
        if small and self.specs[index].act == "none":
            found = self._products_per_image(index, grad)
            if found is not None:
                return found.sum_to_size(factor.shape[:2]).view(factor.shape).to(factor.dtype)
        z = materialise(self.plan, self._output(index)._replace(factor=None))
        products = grad.float() * z.float() if grad.dtype.itemsize < 4 else grad * z
        return products.sum_to_size(factor.shape).to(factor.dtype)

    def _products_per_image(self, index: int, grad: Tensor) -> Tensor | None:
        """sum(grad * z) [N, C] over each image, z = scale*raw + shift, in one pass that sums; None
        where that would take a launch for every image.
        """
        raw = self._raw(index)
        stats = self._output(index).known_stats
        n, c, h, w = raw.shape
        reduce = self.plan.run("bn_act_backward_reduce")
        # With invstd = 1 the second sum is that of grad * (raw - mean).
        centred = torch.stack([stats[0], *torch.ones_like(stats[1:])])
        if raw.is_contiguous() and grad.is_contiguous():
            rows = centred.repeat(1, n)
            branch = Branch(raw.view(1, n * c, h, w), rows)
            sums = reduce(grad.view(1, n * c, h, w), _OPEN, (branch,)).view(-1, n, c)
        elif raw.device.type == "cpu":
            pairs = zip(grad.split(1), raw.split(1), strict=True)
            each = [reduce(g, _OPEN, (Branch(y, centred),)) for g, y in pairs]
            sums = torch.stack(each, 1)
        else:
            return None
        return sums[1] * stats[3] + sums[0] * (stats[0] * stats[3] + stats[4])

    def _projection(self, incoming: PendingGrad) -> None:
        index = self.last + 1
        self.sums[index] = incoming.sums
        wants_source = self.needs.below[-1]
        if not self.needs.passes[index]:
            return
        grad, _ = self._unit(index, incoming, self._input(index), wants_source, None, None)
        if grad is not None and self.block.pool is not None:
            grad = _unpool(self.block, grad, self._source())
        self.grad_x = grad

    def _source(self) -> Tensor:
        """Where the shortcut starts."""
        if self.block.shortcut == "activated":
            return materialise(self.plan, self._input(1))
        return self.x

    def _main_path(self, given: list[PendingGrad]) -> None:
        joins = 1 if self.block.shortcut == "activated" else 0
        for index in range(self.last, -1, -1):
            incoming = given.pop()
            self.sums[index] = incoming.sums
            below = self.needs.below[index]
            if not self.needs.passes[index]:
                return
            accumulate = self._residual_gradient() if index == joins and below else None
            if self.plan.convs[index] is None:
                grad, sums = self._without_convolution(incoming, accumulate)
            else:
                reduce = self._reduction(index - 1) if index else None
                source = self._input(index)
                grad, sums = self._unit(index, incoming, source, below, accumulate, reduce)
            del incoming
            if index == 0:
                self.grad_x = grad
            elif grad is None or not below:
                return
            else:
                given.append(self._through_unit(index - 1, grad, sums))

    def _without_convolution(
        self, incoming: PendingGrad, accumulate: Tensor | Gated | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """A norm alone: the gradient of what it was given, and the shortcut's added to it."""
        grad = form(self.plan, incoming)
        if isinstance(accumulate, Gated):
            accumulate = self._through_gate(*accumulate)
        return (grad if accumulate is None else grad + accumulate), None

    def _reduction(self, index: int) -> tuple[Gate, Branch] | None:
        """The sums that the unit behind `index` is to deliver for it, if it is."""
        unit = self.specs[index]
        unread = index in self.block.unread
        if unit.scale or unread or not self.needs.sums[index] or self._forms(index):
            return None
        return self._inner_gate(index), self._branch(index)

    def _forms(self, index: int) -> bool:
        """Whether a unit's gradient is formed by the primitive that also sums: all of it is wanted,
        and no kernel of the convolution forms it on the way in.
        """
        act = self.specs[index].act
        if index >= self.last and self.block.simple_end:
            act = self.block.act
        conv = self.plan.convs[index]
        return (
            self.plan.whole("bn_act_backward", act) is not None
            and (conv is None or conv.joint is None)
            and self.specs[index].scaled_norm
            and self.needs.sums[index]
            and self.needs.passes[index]
        )

    def _forms_end(self) -> bool:
        """Whether the gradients of all branches of the block's end are formed together."""
        ends = range(self.last, len(self.specs))
        counts = {self._count(index) for index in ends}
        return len(counts) == 1 and all([self._forms(index) for index in ends])

    def _unit(
        self,
        index: int,
        incoming: PendingGrad,
        source: Act,
        want_x: bool,
        accumulate: Tensor | Gated | None,
        reduce: tuple[Gate, Branch] | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        conv, unit, tensors = self.plan.convs[index], self.specs[index], self.units[index]
        assert conv is not None and unit.conv is not None and tensors.weight is not None
        backward = conv.joint.run if conv.joint else conv_backward(self.plan, conv)
        x, prologue = source.raw, None
        if not source.plain:
            if source.factor is None and source.value is None:
                prologue = source.prologue
            elif self.needs.units[index].weight:
                x = materialise(self.plan, source)
        grad_x, self.grad_weights[index], sums = backward(
            incoming,
            x,
            tensors.weight,
            unit.conv,
            prologue=prologue,
            want_x=want_x,
            want_weight=self.needs.units[index].weight,
            accumulate=accumulate,
            reduce=reduce,
        )
        return grad_x, sums

    # ------------------------------------------------------------ what it walks over

    def _end_gate(self) -> Gate:
        act = self.block.act
        if act == "none":
            return _OPEN
        if self.block.keeps_mask:
            return Gate("mask", self.saved.mask, act)
        return Gate("affine", None, act)

    def _inner_gate(self, index: int) -> Gate:
        act = self.specs[index].act
        if act == "none":
            return _OPEN
        if index in self.block.unread:
            return Gate("out", self.saved.activated[index], act)
        return Gate("affine", None, act)

    def _branch(self, index: int) -> Branch:
        raw = self._like_raw(index)
        stats = self.saved.stats[index]
        known = identity_stats(raw) if stats is None or not self.specs[index].scaled_norm else stats
        return Branch(raw, known)

    def _like_raw(self, index: int) -> Tensor:
        """A unit's raw output, or a tensor of its shape where no result depends on the values."""
        value = self.saved.raw[index]
        if value is None and index not in self.block.unread:
            return self._raw(index)
        if value is None:
            value = self.saved.activated[index] if index < self.last else self.grad_out
        assert value is not None
        return value

    def _raw(self, index: int) -> Tensor:
        """The raw output of a unit's convolution, or what a unit without one was given."""
        raw = self.saved.raw[index]
        if raw is None:
            raw = self._recompute(index)
            self.saved.raw[index] = raw
        return raw

    def _recompute(self, index: int) -> Tensor:
        conv, unit, tensors = self.plan.convs[index], self.specs[index], self.units[index]
        given = self._input(index)
        if conv is None:
            return materialise(self.plan, given)
        fused = not given.plain and given.factor is None and conv.prologue is not None
        prologue = given.prologue if fused else None
        implementation = conv.prologue if fused and conv.prologue else conv.forward
        x = given.raw if fused else materialise(self.plan, given)
        raw, _ = implementation.run(x, tensors.weight, tensors.bias, unit.conv, prologue=prologue)
        return raw

    def _input(self, index: int) -> Act:
        """What unit `index` was given in forward."""
        if index > self.last:
            return Act(pooled(self.block, self._source(), self.fmt))
        if index == 0:
            return Act(self.x)
        if self.block.keeps_value[index - 1]:
            activated = self.saved.activated[index - 1]
            assert activated is not None
            return Act(activated)
        return self._output(index - 1)

    def _output(self, index: int) -> Act:
        """What unit `index` gave in forward, by what was kept."""
        unit, tensors = self.specs[index], self.units[index]
        return Act(self._raw(index), self.saved.stats[index], unit.act, tensors.factor)

    def _residual_gradient(self) -> Tensor | Gated | None:
        """What the shortcut adds to the gradient of where it starts."""
        if self.block.projection is not None:
            return self.grad_x
        return self.end if self.block.shortcut in ("input", "activated") else None

    def _count(self, index: int) -> int:
        if not self.specs[index].batch_stats:
            return 0
        raw = self._like_raw(index)
        return raw.shape[0] * raw.shape[2] * raw.shape[3]

    # ------------------------------------------------------------ what is wanted

    def collect(self, fmt: torch.memory_format) -> list[Tensor]:
        """The wanted gradients, in the operator's order."""
        grads: list[Tensor] = []
        if self.needs.x:
            assert self.grad_x is not None
            grads.append(dense(self._owned(self.grad_x), fmt))
        if self.needs.residual:
            assert self.grad_residual is not None
            grads.append(self._owned(self.grad_residual))
        for index, needs in enumerate(self.needs.units):
            grads += self._unit_gradients(index, needs)
        return grads

    def _owned(self, grad: Tensor) -> Tensor:
        """A gradient that nothing was done to is still the caller's: an operator returns a copy."""
        return grad.clone() if grad is self.grad_out else grad

    def _unit_gradients(self, index: int, needs: UnitNeeds) -> list[Tensor]:
        tensors, grads = self.units[index], []
        if needs.weight:
            grad = self.grad_weights[index]
            assert grad is not None and tensors.weight is not None
            grads.append(dense(grad, memory_format_of(tensors.weight)))
        if needs.bias:
            grads.append(self._bias_gradient(index))
        if needs.norm_weight:
            grads.append(self._sum(index, None))
        if needs.norm_bias:
            grads.append(self._sum(index, 0))
        if needs.factor:
            factor = self.grad_factors[index]
            assert factor is not None
            grads.append(factor)
        return grads

    def _sum(self, index: int, row: int | None) -> Tensor:
        """A row of the unit's sums, copied: parameters must not share memory as their gradient."""
        sums = self.sums[index]
        assert sums is not None
        return sums[1 if row is None else row].to(self.acc, copy=True)

    def _bias_gradient(self, index: int) -> Tensor:
        """A convolution's bias in front of batch statistics cancels: its gradient is zero."""
        sum_g, stats = self._sum(index, 0), self.saved.stats[index]
        if self.specs[index].batch_stats:
            return torch.zeros_like(sum_g)
        return sum_g * stats[3] if stats is not None and self.specs[index].scaled_norm else sum_g


def _own_sums(sums: Tensor, branch: int) -> Tensor:
    """`sums` with the row of one branch's own sum_gx in front of the other's."""
    if branch == 0 or not sums.numel():
        return sums
    return torch.stack([sums[0], sums[2], sums[1]])


def _unpool(block: Block, grad: Tensor, x: Tensor) -> Tensor:
    p = block.pool
    assert p is not None
    return torch.ops.aten.avg_pool2d_backward(
        grad, x, p.kernel, p.stride, p.padding, p.ceil_mode, p.count_include_pad, None
    )
