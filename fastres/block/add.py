"""The autograd Function of the plain residual addition with its activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres.block import library as _library  # noqa: F401  (defines the operators)
from fastres.block.second import masked, wants_torch
from fastres.kernels import memory_format_of


class _AddAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, act: str, backend: str) -> Tensor:
        ctx.act, ctx.backend = act, backend
        ctx.channels_last = memory_format_of(x) == torch.channels_last
        out, mask = torch.ops.fastres.add_act(x, residual, act, True, backend)
        ctx.save_for_backward(mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        x, residual = ctx.needs_input_grad[:2]
        if wants_torch((grad_out,)):
            grad = masked(grad_out, mask, ctx.channels_last)
            return grad if x else None, grad if residual else None, None, None
        grad = torch.ops.fastres.add_act_backward(
            grad_out, mask, ctx.act, ctx.channels_last, ctx.backend
        )
        return grad if x else None, grad if residual else None, None, None


def add_act(x: Tensor, residual: Tensor, act: str, save: bool, backend: str) -> Tensor:
    """act(x + residual) for two [N, C, H, W] tensors of one dtype, under autograd if `save`."""
    if save:
        return _AddAct.apply(x, residual, act, backend)
    return torch.ops.fastres.add_act(x, residual, act, False, backend)[0]
