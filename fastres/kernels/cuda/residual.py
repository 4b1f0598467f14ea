"""The plain residual addition with its activation, and the activation's backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels.cuda.batch_norm import apply, scale_shift_act
from fastres.kernels.cuda.module import why_not
from fastres.kernels.registry import register
from fastres.kernels.types import Gate


@register("add_act", "cuda", why_not=why_not)
def add_act(
    x: Tensor, residual: Tensor, *, act: str = "relu", want_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    """act(x + residual), and its mask."""
    return scale_shift_act(x, None, residual=residual, act=act, want_mask=want_mask)


@register("act_backward", "cuda", why_not=why_not)
def act_backward(grad_out: Tensor, gate: Gate, *, out: Tensor | None = None) -> Tensor:
    """The gated gradient, into `out` where it is given."""
    if gate.kind == "affine":
        raise NotImplementedError("gate must be none, mask or out, got affine")
    found = torch.empty_like(grad_out) if out is None else out
    apply(grad_out, gate, (), None, 0, (None, None), found, in_place=out is not None)
    return found
