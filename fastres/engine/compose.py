"""A unit's backward out of single primitives, for backends without one of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastres.engine.plan import ConvPlan, Plan
from fastres.primitives import Branch, ConvSpec, Gate, Gated, PendingGrad, Prologue


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
        (grad_y,), _ = plan.run("bn_act_backward_apply")(
            grad.grad_out, grad.gate, (grad.branch,), grad.sums, grad.values, want_grads=(True,)
        )
        grad_weight = grad_x = sums = None
        if want_weight:
            z = x
            if prologue is not None:
                z, _ = plan.run("scale_shift_act")(x, prologue.stats, act=prologue.act)
            grad_weight = conv_plan.weight.run(grad_y, z, weight, conv)
        if want_x:
            if isinstance(accumulate, Gated):
                accumulate = plan.run("act_backward")(accumulate.grad_out, accumulate.gate)
            grad_x = conv_plan.data.run(grad_y, weight, x, conv, accumulate=accumulate)
        if reduce is not None:
            gate, branch = reduce
            sums = plan.run("bn_act_backward_reduce")(grad_x, gate, (branch,))
        return grad_x, grad_weight, sums

    return run
