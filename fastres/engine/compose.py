"""A unit out of single primitives: its convolution forward, and its backward where no backend has
one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastres.engine.plan import ConvPlan, Plan
from fastres.engine.spec import UnitSpec
from fastres.primitives import Branch, ConvSpec, Gate, Gated, PendingGrad, Prologue


class Pending(NamedTuple):
    """An activation on its way: a raw tensor, and what is still to be applied to it."""

    raw: Tensor
    prologue: Prologue | None = None


def convolve(
    plan: Plan,
    conv: ConvPlan,
    unit: UnitSpec,
    parameters: tuple[Tensor | None, Tensor | None],
    given: Pending,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A unit's convolution: its raw output, the state of that where it comes with it, and its input
    where that had to be formed first: for a convolution without prologue, or to `keep` it.
    """
    z = None
    fused = given.prologue is not None and conv.prologue is not None and not keep
    if given.prologue is not None and not fused:
        z = materialise(plan, given)
        given = Pending(z)
    implementation = conv.prologue if fused and conv.prologue else conv.forward
    raw, state = implementation.run(
        given.raw,
        *parameters,
        unit.conv,
        prologue=given.prologue,
        want_state=unit.batch_stats and conv.stats,
    )
    return raw, state, z


def materialise(plan: Plan, given: Pending) -> Tensor:
    """The activation itself, act(scale*raw + shift)."""
    if given.prologue is None:
        return given.raw
    stats, act = given.prologue
    z, _ = plan.run("scale_shift_act", act)(given.raw, stats, act=act)
    return z


def conv_backward(plan: Plan, conv_plan: ConvPlan) -> Callable[..., Any]:
    """The primitive `conv_backward`, composed of the plan's other primitives."""

    def run(
        grad: PendingGrad,
        x: Tensor,
        weight: Tensor,
        conv: ConvSpec,
        *,
        prologue: Prologue | None,
        want_x: bool,
        want_weight: bool,
        accumulate: Tensor | Gated | None,
        reduce: tuple[Gate, Branch] | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad_y,), _ = plan.run("bn_act_backward_apply", grad.gate.applied)(
            grad.grad_out, grad.gate, (grad.branch,), grad.sums, grad.values, want_grads=(True,)
        )
        grad_weight = grad_x = sums = None
        if want_weight:
            z = materialise(plan, Pending(x, prologue))
            grad_weight = conv_plan.weight.run(grad_y, z, weight, conv)
        if want_x:
            if isinstance(accumulate, Gated):
                outer, gate = accumulate
                accumulate = plan.run("act_backward", gate.applied)(outer, gate)
            grad_x = conv_plan.data.run(grad_y, weight, x, conv, accumulate=accumulate)
        if reduce is not None:
            gate, branch = reduce
            sums = plan.run("bn_act_backward_reduce", gate.applied)(grad_x, gate, (branch,))
        return grad_x, grad_weight, sums

    return run
