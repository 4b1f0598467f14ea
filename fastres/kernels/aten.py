"""The `aten` backend: torch's own convolutions (oneDNN, cuDNN, cuBLAS), torch ops around them.

It runs on every device torch runs on, fuses nothing, and is what the others fall back to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import reference
from fastres.kernels.backend import Backend, declare
from fastres.kernels.formulas import POINTWISE, bind, register_formulas
from fastres.kernels.registry import Request, register
from fastres.kernels.types import (
    Conv,
    MaxPool,
    Prologue,
    RunningUpdate,
    acc_dtype,
    dense,
    memory_format_of,
)

declare(Backend("aten", ("cpu", "cuda"), why_not=lambda: None))
register_formulas("aten", POINTWISE, acc=acc_dtype)
formula_scale_shift_act = bind(reference.scale_shift_act, acc_dtype)

aten = torch.ops.aten


def _fuses_nothing(request: Request) -> str | None:
    if request.features:
        return f"torch's convolution has no {' or '.join(sorted(request.features))}"
    return None


def _geometry(conv: Conv) -> tuple[Any, ...]:
    stride, padding, dilation, groups = conv
    return (list(stride), list(padding), list(dilation), False, [0, 0], groups)


@register("conv_forward", "aten", why_not=_fuses_nothing, name="convolution")
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    *,
    prologue: Prologue | None = None,
    want_state: bool = False,
) -> tuple[Tensor, None]:
    """torch's convolution, in the layout that the block goes by whatever the library gave."""
    y = aten.convolution(x, weight, bias, *_geometry(conv))
    return dense(y, memory_format_of(x, (weight,))), None


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, conv: Conv, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return aten.convolution_backward(grad_y, x, weight, None, *_geometry(conv), wanted)


@register("conv_backward_data", "aten", name="convolution_backward")
def conv_backward_data(
    grad_y: Tensor,
    weight: Tensor,
    like: Tensor,
    conv: Conv,
    *,
    accumulate: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """torch's gradient of the input, then an addition where there is something to accumulate."""
    grad = _backward(grad_y, like, weight, conv, [True, False, False])[0]
    grad = dense(grad, memory_format_of(like))
    return grad if accumulate is None else grad.add_(accumulate)


@register("conv_backward_weight", "aten", why_not=_fuses_nothing, name="convolution_backward")
def conv_backward_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    *,
    prologue: Prologue | None = None,
) -> Tensor:
    """torch's gradient of the weight."""
    return _backward(grad_y, x, weight, conv, [False, True, False])[1]


def _fold(weight: Tensor, bias: Tensor | None, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that has the batch norm of `stats` folded in."""
    scale, shift = stats[3], stats[4]
    if bias is not None:
        shift = shift + scale * bias
    return weight * scale.view(-1, 1, 1, 1), shift


def convolution_one_pass(
    scale_shift_act: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    stats: Tensor,
    *,
    residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """`conv_bn_act` as torch's convolution, and `scale_shift_act` in place behind it."""
    y, _ = conv_forward(x, weight, bias, conv)
    out: Tensor = scale_shift_act(y, stats, residual=residual, act=act, out=y)[0]
    return out


@register("conv_bn_act", "aten", name="folded")
def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    stats: Tensor,
    *,
    residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """Inference: a convolution with the batch norm folded in, then add and activation.

    Below float32 nothing is folded: a shift rounded to 8 bits of mantissa is off by more than
    torch's own result where the mean is large against the standard deviation.
    """
    if weight.dtype != stats.dtype:
        return convolution_one_pass(
            formula_scale_shift_act, x, weight, bias, conv, stats, residual=residual, act=act
        )
    y, _ = conv_forward(x, *_fold(weight, bias, stats), conv)
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if act == "relu" else reference.activate(y, act)


@register("scale_shift_act_pool", "aten", name="max_pool2d")
def scale_shift_act_pool(
    y: Tensor,
    stats: Tensor,
    *,
    pool: MaxPool,
    act: str = "none",
    want_argmax: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch's pooling of what `scale_shift_act` gives, its indices as taps."""
    z, _ = formula_scale_shift_act(y, stats, act=act)
    fmt = memory_format_of(y)
    if not want_argmax:
        return dense(pool.apply(z), fmt), None
    out, indices = aten.max_pool2d_with_indices(z, *pool)
    return dense(out, fmt), dense(reference.taps_of(indices, pool, y.shape[3]), fmt)


@register("max_pool_backward", "aten", name="max_pool2d_backward")
def max_pool_backward(
    grad_out: Tensor, argmax: Tensor, pool: MaxPool, size: tuple[int, int]
) -> Tensor:
    """torch's gradient of the pooling, which looks at the sizes of its input alone."""
    fmt = memory_format_of(grad_out)
    like = torch.empty(
        (*grad_out.shape[:2], *size), dtype=grad_out.dtype, device=grad_out.device,
        memory_format=fmt,
    )  # fmt: skip
    indices = dense(reference.indices_of(argmax, pool, size[1]), fmt)
    return dense(aten.max_pool2d_with_indices_backward(grad_out, like, *pool, indices), fmt)


@register("update_running", "aten", name="foreach")
def update_running(updates: Sequence[RunningUpdate]) -> None:
    """Three calls for all of them where they share dtype and momentum, else the formula."""
    running: list[Tensor] = []
    batch: list[Tensor] = []
    unbiased: list[float] = []
    dtypes = {u.stats.dtype for u in updates}
    momenta = set()
    for u in updates:
        for buffer, row in ((u.running_mean, 0), (u.running_var, 1)):
            if buffer is not None:
                running.append(buffer)
                batch.append(u.stats[row])
                unbiased.append(u.count / (u.count - 1) if row and u.count != 1 else 1.0)
                dtypes.add(buffer.dtype)
        momenta.add(None if isinstance(u.momentum, Tensor) else u.momentum)
    distinct = len({t.data_ptr() for t in running}) == len(running)  # a norm may be shared
    momentum = momenta.pop() if len(momenta) == 1 else None
    if momentum is None or not (running and distinct and len(dtypes) == 1):
        acc = torch.float64 if torch.float64 in dtypes else torch.float32
        reference.update_running(updates, acc=acc)
        return
    with torch.no_grad():
        for u in updates:
            if u.counter is not None:
                u.counter.add_(1)
        torch._foreach_mul_(running, 1 - momentum)
        taken = torch._foreach_mul(batch, unbiased)
        torch._foreach_add_(running, taken, alpha=momentum)
