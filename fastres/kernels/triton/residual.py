"""The plain residual addition with its activation, and the activation's backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels.common import GATE_CODES, new_mask
from fastres.kernels.registry import register
from fastres.kernels.triton.activation import gate_flags, output_flags
from fastres.kernels.triton.support import Matrix, why_not
from fastres.kernels.triton.walk import walk
from fastres.kernels.types import Gate


@register("add_act", "triton", why_not=why_not)
def add_act(
    x: Tensor, residual: Tensor, *, act: str = "relu", want_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    """act(x + residual), and its mask."""
    out = torch.empty_like(x)
    mask = new_mask(x) if want_mask else None
    flags = {**output_flags(act, want_mask), "HAS_MASK": want_mask}
    walk("add_act", "add_act_fwd_kernel", Matrix.of(x), (x, residual, out, mask), flags)
    return out, mask


@register("act_backward", "triton", why_not=why_not)
def act_backward(grad_out: Tensor, gate: Gate, *, out: Tensor | None = None) -> Tensor:
    """The gated gradient, into `out` where it is given."""
    if gate.kind == "affine":
        raise NotImplementedError("gate must be none, mask or out, got affine")
    in_place = out is not None
    out = torch.empty_like(grad_out) if out is None else out
    flags = gate_flags(gate)
    if flags["GATE"] == GATE_CODES["none"]:
        return out.copy_(grad_out)
    walk(
        "add_act", "act_bwd_kernel", Matrix.of(grad_out), (grad_out, gate.tensor, out),
        flags, in_place=in_place,
    )  # fmt: skip
    return out
