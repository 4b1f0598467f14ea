"""Convolutions through oneDNN, walked in chunks of images that stay in cache.

A chunk is normalised, convolved, and its statistics taken while it is in cache, so a prologue or
a reduction costs no pass over memory: level c of docs/design.md on a CPU. Several chunks are
convolved into one tensor: oneDNN's "sum" post-operation adds onto memory of ours, which is zeroed
or holds the residual's gradient, and where one of its own would page-fault at every step.

It takes what `fastres.kernels.cpu.native` leaves: groups, and bfloat16 by AMX.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fastres.kernels.aten import conv_backward_data as aten_data
from fastres.kernels.aten import conv_backward_weight as aten_weight
from fastres.kernels.aten import convolution_one_pass
from fastres.kernels.common import ACT_CODES
from fastres.kernels.cpu.module import empty
from fastres.kernels.cpu.pointwise import (
    act_backward,
    bn_act_backward_apply,
    bn_act_backward_reduce,
    channel_stats,
    scale_shift_act,
)
from fastres.kernels.registry import Request, register
from fastres.kernels.types import Branch, Conv, Gate, Gated, PendingGrad, Prologue, dense

#: Bytes of the largest tensor of a chunk. Two of them fit the last-level cache of small machines.
CHUNK_BYTES = 16 << 20

#: other = conv(X, W) + B + other, and the same with an output of its own
_onednn = torch.ops.mkldnn._convolution_pointwise_.binary
_onednn_new = torch.ops.mkldnn._convolution_pointwise.default

#: On one thread torch hands float32 batches below 16 to a convolution that is slower than oneDNN's.
_LEAST_IMAGES = 16


def _why_not(request: Request) -> str | None:
    """Where oneDNN does not take the tensors as they lie, torch's own convolution is used."""
    if request.device != "cpu" or not request.channels_last:
        return "it takes channels_last tensors on the CPU"
    if request.act not in ACT_CODES:
        return f"activation {request.act!r} has no CPU kernel"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "oneDNN is not available"
    if request.dtype == torch.float32:
        return None
    if request.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return f"oneDNN convolves float32 (and bfloat16 where the CPU does), got {request.dtype}"


def _chunks(images: int, *per_image: int) -> list[tuple[int, int]]:
    """Ranges of images whose largest tensor, of `per_image` bytes, is at most about CHUNK_BYTES.

    A power of two, since a convolution's threads share images out evenly.
    """
    least = _LEAST_IMAGES if torch.get_num_threads() == 1 else 1
    fitting = max(least, CHUNK_BYTES // max(1, *per_image))
    step = 1 << (fitting.bit_length() - 1)
    if step >= images:
        return [(0, images)]
    return list(pairwise([*range(0, images, step), images]))


def _image_bytes(t: Tensor) -> int:
    return t.numel() // t.shape[0] * t.element_size()


def _convolve_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> None:
    """out += conv(x, weight) + bias, in one call."""
    stride, padding, dilation, groups = conv
    _onednn(out, x, weight, bias, padding, stride, dilation, groups, "add", 1.0, None, [], None)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    """conv(x, weight) + bias, small enough that its memory is some that was used before."""
    stride, padding, dilation, groups = conv
    y = _onednn_new(x, weight, bias, padding, stride, dilation, groups, "none", [], None)
    return dense(y, torch.channels_last)


def _packed(weight: Tensor, conv: Conv, chunk_shape: Sequence[int], uses: int) -> Tensor:
    """The weight in oneDNN's own order where it is used often enough to be worth it."""
    if uses < 2:
        return weight
    stride, padding, dilation, groups = conv
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, list(chunk_shape)
    )


def _new_output(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    h, w = conv.output_size(x.shape[2:], weight.shape[2:])
    return empty((x.shape[0], weight.shape[0], h, w), x.dtype, channels_last=True)


@register("conv_forward", "cpu", why_not=_why_not, name="onednn_chunked")
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    *,
    prologue: Prologue | None = None,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = conv(P(x), weight) + bias and its statistics, chunk by chunk."""
    # oneDNN reads a bias with a stride of 1, whatever its own is.
    bias = None if bias is None else bias.contiguous()
    chunks = _forward_chunks(x, weight, conv)
    z = _scratch(x, chunks) if prologue is not None else x
    if len(chunks) == 1:
        y = _convolved(x if prologue is None else _applied(prologue, x, z), weight, bias, conv)
        return y, channel_stats(y) if want_state else None
    y = _new_output(x, weight, conv)
    weight = _packed(weight, conv, z[slice(*chunks[0])].shape, len(chunks))
    state, done = None, 0
    for a, b in chunks:
        source = x[a:b]
        if prologue is not None:
            source = _applied(prologue, x[a:b], z[: b - a])
        _convolve_into(y[a:b].zero_(), source, weight, bias, conv)
        if want_state:
            state = channel_stats(y[a:b], state, done)
            done += (b - a) * y.shape[2] * y.shape[3]
    return y, state


def _forward_chunks(x: Tensor, weight: Tensor, conv: Conv) -> list[tuple[int, int]]:
    h, w = conv.output_size(x.shape[2:], weight.shape[2:])
    output = weight.shape[0] * h * w * x.element_size()
    return _chunks(x.shape[0], _image_bytes(x), output)


def _applied(prologue: Prologue, x: Tensor, out: Tensor | None) -> Tensor:
    """What the convolution reads: x with its pending normalisation and activation."""
    return scale_shift_act(x, prologue.stats, act=prologue.act, out=out)[0]


def _scratch(like: Tensor, chunks: list[tuple[int, int]]) -> Tensor:
    """Memory for one chunk of a tensor like that."""
    # Chunks are alike, but for a last one that may be smaller.
    return empty((chunks[0][1], *like.shape[1:]), like.dtype, channels_last=True)


def _transposed(weight: Tensor, conv: Conv, x: Tensor) -> tuple[Tensor, Conv] | None:
    """The convolution that computes the data gradient, where it is a plain and worthwhile one.

    With a stride that is so for a 1x1 kernel only: the gradient of the pixels it looked at, all
    others being zero. Turning a weight around costs passes over it; where it is large against the
    activations (ResNet's last stage), oneDNN's own backward is faster.
    """
    kernel, (sh, sw) = weight.shape[2:], conv.stride
    alone = max(kernel) == 1 and max(conv.padding) == 0
    plain = conv.groups == 1 and ((sh, sw) == (1, 1) or alone)
    ph, pw = [d * (k - 1) - p for d, k, p in zip(conv.dilation, kernel, conv.padding, strict=True)]
    if not plain or min(ph, pw) < 0 or weight.numel() * 2 * sh * sw > x.numel():
        return None
    turned = weight.transpose(0, 1)
    turned = turned.flip(2, 3) if max(kernel) > 1 else turned
    turned = turned.contiguous(memory_format=torch.channels_last)
    return turned, Conv((1, 1), (ph, pw), conv.dilation, 1)


@register("conv_backward", "cpu", why_not=_why_not, name="onednn_chunked")
def conv_backward(
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
    """Backward of a whole unit: grad_y is formed, used for both gradients, and never stored.

    Args:
        grad: the pending gradient of the unit's raw output.
        x: raw input of the convolution.
        weight: its weight.
        conv: its geometry.
        prologue: what is pending on x.
        want_x: whether the gradient of P(x) is wanted.
        want_weight: whether the gradient of the weight is wanted.
        accumulate: what the gradient of P(x) is added to; a tensor is overwritten.
        reduce: gate and branch of the previous batch norm, whose sums are wanted.

    Returns:
        (grad of P(x), grad of weight, sums of the previous batch norm), None where not wanted.
    """
    chunks = _chunks(x.shape[0], _image_bytes(x), _image_bytes(grad.grad_out))
    grad_y = grad.grad_out if grad.value is not None else _scratch(grad.grad_out, chunks)
    z = _scratch(x, chunks) if prologue is not None and want_weight else None
    data = _DataGradient(x, weight, conv, accumulate, chunks) if want_x else None
    grad_weight: Tensor | None = None
    sums: Tensor | None = None
    for a, b in chunks:
        gy = grad.value
        gy = _form_gradient(grad, a, b, grad_y[: b - a]) if gy is None else gy[a:b]
        if want_weight:
            source = x[a:b]
            if prologue is not None and z is not None:
                source = _applied(prologue, source, z[: b - a])
            part = aten_weight(gy, source, weight, conv).float()
            grad_weight = part if grad_weight is None else grad_weight.add_(part)
        if data is not None:
            grad_x = data.chunk(gy, a, b)
            if reduce is not None:
                gate, branch = reduce
                own = (_images(branch, a, b),)
                sums = bn_act_backward_reduce(grad_x, _gate_images(gate, x, a, b), own, sums=sums)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return (data.result if data else None), grad_weight, sums


def _images(branch: Branch, a: int, b: int) -> Branch:
    return Branch(None if branch.y is None else branch.y[a:b], branch.stats)


def _gate_images(gate: Gate, like: Tensor, a: int, b: int) -> Gate:
    return gate.images(a, b, like.shape[2] * like.shape[3])


def _form_gradient(grad: PendingGrad, a: int, b: int, out: Tensor) -> Tensor:
    """grad_y of images a..b, in memory that is in cache."""
    bn_act_backward_apply(
        grad.grad_out[a:b],
        _gate_images(grad.gate, grad.grad_out, a, b),
        (_images(grad.branch, a, b),),
        grad.sums,
        grad.values,
        want_grads=(True,),
        out=out,
    )
    return out


class _DataGradient:
    """The data gradient, chunk by chunk, accumulated onto the residual's where there is one."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        conv: Conv,
        accumulate: Tensor | Gated | None,
        chunks: list[tuple[int, int]],
    ) -> None:
        self.x, self.weight, self.conv, self.accumulate = x, weight, conv, accumulate
        self.transposed = None
        if (plain := _transposed(weight, conv, x)) is not None:
            k = weight.shape[0]
            h, w = conv.output_size(x.shape[2:], weight.shape[2:])
            shape = (chunks[0][1] - chunks[0][0], k, h, w)
            self.transposed = (_packed(plain[0], plain[1], shape, len(chunks)), plain[1])
        self.result: Tensor | None = None
        if isinstance(accumulate, Tensor):
            self.result = accumulate
        elif len(chunks) > 1 or isinstance(accumulate, Gated) or self._spreads:
            self.result = empty(x.shape, x.dtype, channels_last=True)

    @property
    def _spreads(self) -> bool:
        """Whether what is convolved are the pixels that a stride looked at."""
        return self.transposed is not None and self.conv.stride != (1, 1)

    def chunk(self, grad_y: Tensor, a: int, b: int) -> Tensor:
        """The gradient of images a..b, in place in `result`."""
        if self.result is None:  # one chunk, and nothing to add: what the convolution made
            self.result = self._convolved(grad_y, self.x)
            return self.result
        out = self.result[a:b]
        if isinstance(self.accumulate, Gated):
            gated = self.accumulate
            gate = _gate_images(gated.gate, gated.grad_out, a, b)
            act_backward(gated.grad_out[a:b], gate, out=out)
        elif self.accumulate is None and self.transposed is not None:
            out.zero_()
        if self.transposed is not None and not self._spreads:
            weight, conv = self.transposed
            _convolve_into(out, grad_y, weight, None, conv)
            return out
        found = self._convolved(grad_y, self.x[a:b])
        if self._spreads:
            sh, sw = self.conv.stride
            out[:, :, ::sh, ::sw].add_(found)
            return out
        return out.copy_(found) if self.accumulate is None else out.add_(found)

    def _convolved(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """The gradient of `x`, or with a stride of the pixels that it looked at."""
        if self.transposed is None:
            found: Tensor = aten_data(grad_y, self.weight, x, self.conv)
            return found
        weight, conv = self.transposed
        return _convolved(grad_y, weight, None, conv)


@register("conv_bn_act", "cpu", why_not=_why_not, name="onednn_chunked")
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
    """Inference: each chunk is convolved, then normalised, added to and activated in cache.

    Folding the batch norm into the weight would save nothing more: the sum and the activation
    need their pass over the chunk anyway, since oneDNN's own ReLU turns NaN into 0.
    """
    # oneDNN reads a bias with a stride of 1, whatever its own is.
    bias = None if bias is None else bias.contiguous()
    chunks = _forward_chunks(x, weight, conv)
    if len(chunks) == 1:
        y = _convolved(x, weight, bias, conv)
        return scale_shift_act(y, stats, residual=residual, act=act, out=y)[0]
    y = _new_output(x, weight, conv)
    weight = _packed(weight, conv, x[slice(*chunks[0])].shape, len(chunks))
    for a, b in chunks:
        out = y[a:b].zero_()
        _convolve_into(out, x[a:b], weight, bias, conv)
        added = None if residual is None else residual[a:b]
        scale_shift_act(out, stats, residual=added, act=act, out=out)
    return y


def _why_not_one_pass(request: Request) -> str | None:
    if request.device != "cpu":
        return f"it runs on the CPU, got {request.device}"
    if request.act not in ACT_CODES:
        return f"activation {request.act!r} has no CPU kernel"
    if request.dtype.itemsize >= 4:
        return f"batch norm folds into a convolution of {request.dtype}"
    return None


#: Below float32 nothing is folded, and formulas would take ten passes for one.
register("conv_bn_act", "cpu", why_not=_why_not_one_pass, name="one_pass")(
    partial(convolution_one_pass, scale_shift_act)
)
