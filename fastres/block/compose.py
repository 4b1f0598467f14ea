"""A unit out of single primitives: its convolution forward, and its backward where no backend has
one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastres.block.plan import ConvPlan, Plan
from fastres.block.spec import UnitSpec
from fastres.kernels import Branch, ConvSpec, Gate, Gated, PendingGrad, Prologue


class Pending(NamedTuple):
    """An activation on its way: a raw tensor, and what is still to be applied to it.

    `formed` is the result, where it is there already.
    """

    raw: Tensor
    prologue: Prologue | None = None
    formed: Tensor | None = None


class Formed(NamedTuple):
    """The gradient of a raw output as such, with the sums (sum_g, sum_gx...) it was made of."""

    grad_y: Tensor
    sums: Tensor


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
    if given.formed is not None:
        return given.formed
    stats, act = given.prologue
    z, _ = plan.run("scale_shift_act", act)(given.raw, stats, act=act)
    return z


def conv_backward(plan: Plan, conv_plan: ConvPlan) -> Callable[..., Any]:
    """The primitive `conv_backward`, composed of the plan's other primitives.

    It also takes a gradient that was formed before, and overwrites `accumulate` where that is a
    tensor: such a one is made for it.
    """

    def run(
        grad: PendingGrad | Formed,
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
        grad_y = _form(plan, grad)
        grad_weight = grad_x = sums = None
        if want_weight:
            z = materialise(plan, Pending(x, prologue))
            grad_weight = conv_plan.weight.run(grad_y, z, weight, conv)
        if want_x:
            more, own = _formed_residual(plan, accumulate)
            grad_x = conv_plan.data.run(grad_y, weight, x, conv, accumulate=more, overwrite=own)
        if reduce is not None:
            gate, branch = reduce
            sums = plan.run("bn_act_backward_reduce", gate.applied)(grad_x, gate, (branch,))
        return grad_x, grad_weight, sums

    return run


def _form(plan: Plan, grad: PendingGrad | Formed) -> Tensor:
    if isinstance(grad, Formed):
        return grad.grad_y
    (grad_y,), _ = plan.run("bn_act_backward_apply", grad.gate.applied)(
        grad.grad_out, grad.gate, (grad.branch,), grad.sums, grad.values, want_grads=(True,)
    )
    return grad_y


def _formed_residual(plan: Plan, given: Tensor | Gated | None) -> tuple[Tensor | None, bool]:
    """What a data gradient is added to, and whether nobody else reads it."""
    if not isinstance(given, Gated):
        return given, given is not None
    if given.gate.applied == "none":
        return given.grad_out, False
    return plan.run("act_backward", given.gate.applied)(*given), True
