"""What is done about torch's convolutions: data gradients of pointwise ones as one matrix product,
added to what is there, and one pass behind those of inference.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastres.kernels.aten import convolution_one_pass
from fastres.kernels.cuda.batch_norm import scale_shift_act
from fastres.kernels.cuda.module import why_not
from fastres.kernels.registry import Request, register
from fastres.kernels.types import Conv


def _why_not_product(request: Request) -> str | None:
    if (reason := why_not(request)) is not None:
        return reason
    conv, weight = request.conv, request.weight
    if conv is None or weight is None or not conv.is_pointwise(weight[2:]):
        return "the convolution must be 1x1 with stride 1, without padding or groups"
    if not request.channels_last:
        return "the layout must be channels_last"
    if request.device == "cuda" and request.dtype in _DIFFERING:
        return f"in {request.dtype}, {_DIFFERING[request.dtype]}"
    return None


#: Where torch's products follow switches of their own. In bfloat16 the same switch as in float16
#: lets cuBLAS add the parts of a split sum in 16 bits; nothing can overflow there, and a product
#: with as many rows as a batch has pixels is seldom split.
_DIFFERING = {
    torch.float32: "torch rounds products and convolutions to TF32 by different switches",
    torch.float16: "torch lets products, not convolutions, add parts of a sum in 16 bits",
}


@register("conv_backward_data", "cuda", why_not=_why_not_product, name="addmm")
def conv_backward_data(
    grad_y: Tensor,
    weight: Tensor,
    like: Tensor,
    conv: Conv,
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
    return t.permute(0, 2, 3, 1).view(-1, t.shape[1])


def _why_not_behind(request: Request) -> str | None:
    if request.dtype == torch.float32 and request.act == "none":
        return (
            "without an activation, torch's convolution with the batch norm folded in needs no pass"
        )
    return why_not(request)


conv_bn_act = partial(convolution_one_pass, scale_shift_act)
register("conv_bn_act", "cuda", why_not=_why_not_behind, name="convolution, one pass")(conv_bn_act)
