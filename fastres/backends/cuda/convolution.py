"""Data gradients of pointwise convolutions as one matrix product, added to what is there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.backends.cuda.module import why_not
from fastres.primitives import ConvSpec, Request, register


def _why_not_product(request: Request) -> str | None:
    if (reason := why_not(request)) is not None:
        return reason
    conv, weight = request.conv, request.weight
    if conv is None or weight is None or not conv.is_pointwise(weight[2:]):
        return "the convolution must be 1x1 with stride 1, without padding or groups"
    if not request.channels_last:
        return "the layout must be channels_last"
    if request.dtype == torch.float32 and request.device == "cuda":
        return "in float32, torch rounds products and convolutions to TF32 by different switches"
    return None


@register("conv_backward_data", "cuda", why_not=_why_not_product, name="addmm")
def conv_backward_data(
    grad_y: Tensor,
    weight: Tensor,
    like: Tensor,
    conv: ConvSpec,
    *,
    accumulate: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """grad_y [M, K] @ weight [K, C], added to `accumulate` by the product itself (beta = 1).

    The sum is rounded once. Where `accumulate` may be overwritten it is, and nothing is copied.
    """
    product = (_matrix(grad_y), weight.reshape(weight.shape[:2]))
    if accumulate is not None and overwrite:
        _matrix(accumulate).addmm_(*product)
        return accumulate
    grad = torch.empty_like(like)
    if accumulate is None:
        torch.mm(*product, out=_matrix(grad))
    else:
        torch.addmm(_matrix(accumulate), *product, out=_matrix(grad))
    return grad


def _matrix(t: Tensor) -> Tensor:
    """A dense channels_last [N, C, H, W] as [N*H*W, C], the same memory."""
    return t.permute(0, 2, 3, 1).flatten(0, 2)
