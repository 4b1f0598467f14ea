"""A unit out of single primitives: its convolution forward, and its backward where no backend has
one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastres.block.plan import ConvPlan, Plan
from fastres.block.spec import Block, Unit
from fastres.block.tensors import Act, identity_stats
from fastres.kernels import Branch, Conv, Gate, Gated, PendingGrad, Prologue


def convolve(
    plan: Plan,
    conv: ConvPlan,
    unit: Unit,
    parameters: tuple[Tensor | None, Tensor | None],
    given: Act,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A unit's convolution: its raw output, the state of that where it comes with it, and its input
    where that had to be formed first: for a convolution without prologue, or to `keep` it.
    """
    x, prologue, z = given.raw, None, None
    if not given.plain:
        if conv.prologue is None or keep or given.factor is not None or given.value is not None:
            x = z = materialise(plan, given)
        else:
            prologue = given.prologue
    implementation = conv.forward if prologue is None or conv.prologue is None else conv.prologue
    raw, state = implementation.run(
        x, *parameters, unit.conv, prologue=prologue, want_state=unit.batch_stats and conv.stats
    )
    return raw, state, z


def materialise(plan: Plan, given: Act) -> Tensor:
    """The activation itself, factor * act(scale*raw + shift)."""
    if given.value is not None:
        return given.value
    z = given.raw
    if given.stats is not None or given.act != "none":
        z, _ = plan.run("scale_shift_act", given.act)(z, given.known_stats, act=given.act)
    if given.factor is None:
        return z
    return scaled(z, given.factor, overwrite=z is not given.raw)


def scaled(z: Tensor, factor: Tensor, overwrite: bool = False) -> Tensor:
    """factor * z, in the dtype and layout of z: torch's own product, as no kernel fuses one.

    With `overwrite` in the memory of z, which nobody else reads.
    """
    factor = factor.to(z.dtype)
    return z.mul_(factor) if overwrite else z * factor


def end_of(
    plan: Plan,
    block: Block,
    raw: Tensor,
    stats: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    want_mask: bool,
) -> tuple[Tensor, Tensor | None]:
    """A block's output, of what its last unit and its shortcut left, and its mask."""
    stats = identity_stats(raw) if stats is None else stats
    out, mask = plan.run("scale_shift_act", block.act)(
        raw, stats, residual=residual, residual_stats=residual_stats, act=block.act,
        want_mask=want_mask,
    )  # fmt: skip
    return out, mask


def conv_backward(plan: Plan, conv_plan: ConvPlan) -> Callable[..., Any]:
    """The primitive `conv_backward`, composed of the plan's other primitives.

    It overwrites `accumulate` where that is a tensor: such a one is made for it.
    """

    def run(
        grad: PendingGrad,
        x: Tensor,
        weight: Tensor,
        conv: Conv,
        *,
        prologue: Prologue | None,
        want_x: bool,
        want_weight: bool,
        accumulate: Tensor | Gated | None,
        reduce: tuple[Gate, Branch] | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_y = form(plan, grad)
        grad_weight = grad_x = sums = None
        if want_weight:
            z = x if prologue is None else materialise(plan, Act(x, *prologue))
            grad_weight = conv_plan.weight.run(grad_y, z, weight, conv)
        if want_x:
            more, own = _formed_residual(plan, accumulate)
            grad_x = conv_plan.data.run(grad_y, weight, x, conv, accumulate=more, overwrite=own)
        if reduce is not None:
            gate, branch = reduce
            sums = plan.run("bn_act_backward_reduce", gate.applied)(grad_x, gate, (branch,))
        return grad_x, grad_weight, sums

    return run


def form(plan: Plan, grad: PendingGrad) -> Tensor:
    """The gradient of a raw output itself."""
    if grad.value is not None:
        return grad.value
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
