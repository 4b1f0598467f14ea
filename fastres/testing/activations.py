"""Holds an activation's formulas to each other: no kernel can be better than its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels import Activation, activation

#: Where an activation is looked at: beyond, the usual ones are straight lines within rounding.
_WIDEST = 30.0
_POINTS = 60_001


def check_activation(name: str) -> None:
    """Check that an activation's derivative, gate and bounds are those of its `forward`.

    At 60,001 points of [-30, 30] in float64, without zero, where a kink may be: the derivative
    against torch's autograd, the gate against the derivative, slope against |act'|, curvature
    against the quotients of differences of act' between the kinks. Also that the formulas keep
    dtype and shape.

    Args:
        name: of a registered activation.

    Raises:
        AssertionError: saying what disagrees, and where.
        ValueError: for an unknown name.
    """
    formulas = activation(name)
    v = torch.linspace(-_WIDEST, _WIDEST, _POINTS, dtype=torch.float64)
    v = v[v != 0].requires_grad_()
    out = formulas.forward(v)
    (expected,) = torch.autograd.grad(out.sum(), v)
    v, out = v.detach(), out.detach()
    derivative = formulas.derivative(v)
    # Both round a handful of operations on terms of about |act'| and |v|.
    allowed = 64 * torch.finfo(v.dtype).eps * (1 + v.abs())
    _hold(name, "derivative must be that of forward", (derivative - expected).abs(), allowed, v)
    _hold(name, "slope must bound |act'|", derivative.abs(), allowed + formulas.slope, v)
    if formulas.gate is not None:
        opened = formulas.gate(out).to(v.dtype)
        _hold(name, "gate must be the derivative", (opened - derivative).abs(), 0 * v, v)
    else:
        # A quotient divides the rounding of both its ends by the step.
        smooth = torch.stack(
            [(v[:-1] > k) | (v[1:] < k) for k in (*formulas.kinks, torch.inf)]
        ).all(0)
        steps, width = derivative.diff().abs()[smooth], v.diff()[smooth]
        room = formulas.curvature + 2 * allowed[1:][smooth] / width
        _hold(name, "curvature must bound |act''|", steps / width, room, v[1:][smooth])
    _check_dtypes(name, formulas)


def _hold(name: str, what: str, value: Tensor, allowed: Tensor, v: Tensor) -> None:
    excess = torch.where(value <= allowed, torch.zeros_like(v), value - allowed)
    worst = int(excess.nan_to_num(nan=float("inf")).argmax())
    if not bool((value <= allowed).all()):
        raise AssertionError(
            f"activation {name!r}: {what}, got {value[worst].item():.6g} at {v[worst].item():.6g}, "
            f"allowed {allowed[worst].item():.6g}"
        )


def _check_dtypes(name: str, formulas: Activation) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        v = torch.ones(2, 3, dtype=dtype)
        for formula in (formulas.forward, formulas.derivative):
            value = formula(v)
            if (value.dtype, value.shape) != (dtype, v.shape):
                raise AssertionError(
                    f"activation {name!r}: formulas must keep {dtype} [2, 3], got {value.dtype} "
                    f"{list(value.shape)}"
                )
