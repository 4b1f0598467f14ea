"""Max pooling at the end of a chain, on the kernels of `csrc/cpu`: channels_last."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels.common import ACT_CODES, DTYPE_CODES, address
from fastres.kernels.cpu import pointwise
from fastres.kernels.cpu.module import empty, module
from fastres.kernels.registry import Request, register
from fastres.kernels.types import MaxPool

_kernels = module()


def _why_not(request: Request) -> str | None:
    if not request.channels_last:
        return "it pools channels_last tensors"
    return pointwise.why_not(request)


def _shape(t: Tensor, size: tuple[int, int], pool: MaxPool) -> list[int]:
    """How the kernels are told about the pooling of [N, C, *size], t's [N, C], and its dtype."""
    kernel, stride, padding, dilation, _ = pool
    return [
        *t.shape[:2], *size, *pool.output_size(size), *kernel, *stride, *padding, *dilation,
        DTYPE_CODES[t.dtype],
    ]  # fmt: skip


@register("scale_shift_act_pool", "cpu", why_not=_why_not)
def scale_shift_act_pool(
    y: Tensor,
    stats: Tensor,
    *,
    pool: MaxPool,
    act: str = "none",
    want_argmax: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The maximum over windows of act(scale*y + shift), and the taps it came from."""
    n, c, h, w = y.shape
    shape = (n, c, *pool.output_size((h, w)))
    out = empty(shape, y.dtype, channels_last=True)
    argmax = empty(shape, torch.uint8, channels_last=True) if want_argmax else None
    _kernels.scale_shift_act_pool(
        y.data_ptr(), *pointwise.coefficients(stats), out.data_ptr(), address(argmax),
        ACT_CODES[act], _shape(y, (h, w), pool), torch.get_num_threads(),
    )  # fmt: skip
    return out, argmax


@register("max_pool_backward", "cpu", why_not=_why_not)
def max_pool_backward(
    grad_out: Tensor, argmax: Tensor, pool: MaxPool, size: tuple[int, int]
) -> Tensor:
    """The gradient of what was pooled, of spatial size `size`."""
    grad = empty((*grad_out.shape[:2], *size), grad_out.dtype, channels_last=True)
    _kernels.max_pool_backward(
        grad_out.data_ptr(), argmax.data_ptr(), grad.data_ptr(), _shape(grad_out, size, pool),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad
