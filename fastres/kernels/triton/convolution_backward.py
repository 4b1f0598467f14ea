"""Gradients of convolutions, with grad_y formed before or on the way in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels.common import floats, precision_of
from fastres.kernels.registry import Request, register
from fastres.kernels.triton.activation import gate_flags, prologue_flags
from fastres.kernels.triton.batch_norm import act_backward, bn_act_backward_apply, sum_partials
from fastres.kernels.triton.launch import kernels, launch
from fastres.kernels.triton.products import (
    Problem,
    channels_innermost,
    choose_tile,
    why_not_convolved,
)
from fastres.kernels.triton.support import device_of
from fastres.kernels.types import Branch, Conv, Gate, Gated, PendingGrad, Prologue

#: Programs per multiprocessor that a weight gradient's splits aim at, and the most splits: each
#: leaves a part of the weight's size in float32.
_WEIGHT_PROGRAMS = 4
_MOST_SPLITS = 256


class Incoming(NamedTuple):
    """grad_y as the backward kernels take it: formed, or with what is pending on it."""

    tensors: tuple[Tensor | None, ...]
    flags: dict[str, Any]
    inverse_count: float

    @classmethod
    def formed(cls, grad_y: Tensor) -> Incoming:
        """grad_y itself."""
        flags = {"PENDING": False, **gate_flags(Gate("none")), "HAS_SUMS": False}
        return cls((grad_y, None, None, None, None), flags, 1.0)

    @classmethod
    def pending(cls, grad: PendingGrad) -> Incoming:
        """What grad_y is formed from.

        Raises:
            NotImplementedError: for a gate that is known by the activation's output.
        """
        if grad.gate.kind == "out":
            raise NotImplementedError("gate must be none, mask or affine, got out")
        flags = {"PENDING": True, **gate_flags(grad.gate), "HAS_SUMS": grad.values > 0}
        sums = grad.sums if grad.values else None
        tensors = (grad.grad_out, grad.gate.tensor, grad.branch.y, grad.branch.stats, sums)
        return cls(tensors, flags, 1 / max(grad.values, 1))


def data_gradient(
    incoming: Incoming,
    weight: Tensor,
    like: Tensor,
    conv: Conv,
    accumulate: Tensor | Gated | None,
    reduce: tuple[Gate, Branch] | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the input and, on demand, the sums of the batch norm below it."""
    kernel = kernels().conv_bwd_data.conv_bwd_data_kernel
    p, weight = Problem.of(like, weight, conv), channels_innermost(weight)
    residual, residual_gate, kind = _residual(accumulate)
    gate, below = reduce or (Gate("none"), Branch(None, None))  # type: ignore[arg-type]
    if gate.kind not in ("none", "affine"):
        raise NotImplementedError(f"the gate below must be none or affine, got {gate.kind}")
    flags = {
        **incoming.flags,
        "RESIDUAL": kind,
        "HAS_BELOW": reduce is not None,
        **gate_flags(gate, "BELOW_"),
        "PRECISION": precision_of(like.dtype),
    }
    (sh, sw), group_in = conv.stride, p.channels // conv.groups
    class_pixels = p.images * -(-p.height // sh) * -(-p.width // sw)

    def run(tile: Any) -> tuple[Tensor, Tensor | None]:
        grad_x, tiles = torch.empty_like(like), sh * sw * -(-class_pixels // tile.m)
        tail, partials = p.out_channels // conv.groups % tile.k > 0, None
        if reduce is not None:
            partials = floats(tiles, 3, p.channels, device=like.device)
        launch(
            kernel,
            (tiles * conv.groups * -(-group_in // tile.n),),
            (*incoming.tensors, weight, residual, residual_gate, *below, grad_x, partials),
            (*p.sizes, incoming.inverse_count),
            {**p.constants, **flags, "WIDE": p.wide, "TAIL_K": tail, **tile.constants},
            **tile.options,
        )
        return grad_x, partials

    if class_pixels == 0:
        return torch.empty_like(like), like.new_zeros(3, p.channels, dtype=torch.float32)
    shape = (class_pixels, group_in, p.out_channels // conv.groups)
    grad_x, partials = run(choose_tile(kernel, p, shape, flags, run, like))
    return grad_x, None if partials is None else sum_partials(partials)


def _residual(accumulate: Tensor | Gated | None) -> tuple[Tensor | None, Tensor | None, int]:
    """(gradient, mask, the kernel's code) of what a data gradient is added to."""
    if accumulate is None:
        return None, None, 0
    if isinstance(accumulate, Tensor):
        return accumulate, None, 1
    grad_out, gate = accumulate
    if gate.kind == "mask":
        return grad_out, gate.tensor, 2
    if gate.kind == "none":
        return grad_out, None, 1
    return act_backward(grad_out, gate), None, 1


def weight_gradient(
    incoming: Incoming, x: Tensor, weight: Tensor, conv: Conv, prologue: Prologue | None
) -> Tensor:
    """Gradient of the weight, its parts summed in order."""
    kernel, p = kernels().conv_bwd_weight.conv_bwd_weight_kernel, Problem.of(x, weight, conv)
    x_stats = None if prologue is None else prologue.stats
    flags = {**incoming.flags, **prologue_flags(prologue), "PRECISION": precision_of(x.dtype)}
    group_in, group_out = p.channels // conv.groups, p.out_channels // conv.groups
    kh, kw = p.kernel

    def run(tile: Any) -> Tensor:
        programs = kh * kw * conv.groups * -(-group_out // tile.m) * -(-group_in // tile.n)
        steps, splits = _splits(p.out_pixels, tile.k, programs, device_of(x).processors)
        parts = floats(splits, p.out_channels, kh, kw, group_in, device=x.device)
        launch(
            kernel,
            (programs * splits,),
            (*incoming.tensors, x, x_stats, parts),
            (*p.sizes, incoming.inverse_count, steps),
            {**p.constants, **flags, "WIDE": p.wide, **tile.constants},
            **tile.options,
        )
        return parts

    if p.out_pixels == 0:
        return torch.zeros_like(weight)
    shape = (group_out, group_in, p.out_pixels)
    parts = run(choose_tile(kernel, p, shape, flags, run, x, splits=True))
    return sum_partials(parts, weight.dtype).permute(0, 3, 1, 2)


def _splits(pixels: int, block: int, programs: int, processors: int) -> tuple[int, int]:
    """(steps of a split, splits) of the sum over pixels."""
    blocks = -(-pixels // block)
    wanted = max(1, min(_MOST_SPLITS, blocks, _WEIGHT_PROGRAMS * processors // programs))
    steps = -(-blocks // wanted)
    return steps, -(-blocks // steps)


@register("conv_backward_data", "triton", why_not=why_not_convolved, name="implicit_gemm")
def conv_backward_data(
    grad_y: Tensor,
    weight: Tensor,
    like: Tensor,
    conv: Conv,
    *,
    accumulate: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Gradient of the input, added to `accumulate` in the same launch, into memory of its own."""
    return data_gradient(Incoming.formed(grad_y), weight, like, conv, accumulate, None)[0]


@register("conv_backward_weight", "triton", why_not=why_not_convolved, name="implicit_gemm")
def conv_backward_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    *,
    prologue: Prologue | None = None,
) -> Tensor:
    """Gradient of the weight; P(x) is formed on the way in."""
    return weight_gradient(Incoming.formed(grad_y), x, weight, conv, prologue)


def _unit_backward(
    incoming: Incoming,
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
    grad_x = grad_weight = sums = None
    if want_weight:
        grad_weight = weight_gradient(incoming, x, weight, conv, prologue)
    if want_x:
        grad_x, sums = data_gradient(incoming, weight, x, conv, accumulate, reduce)
    return grad_x, grad_weight, sums


def _forms_in_prologue(request: Request) -> str | None:
    if "grad_formed" in request.features:
        return "it forms grad_y in its prologues"
    return why_not_convolved(request)


@register("conv_backward", "triton", why_not=_forms_in_prologue, name="grad_prologue")
def conv_backward_pending(
    grad: PendingGrad, x: Tensor, weight: Tensor, conv: Conv, **wanted: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward of a unit at level c: grad_y is formed in both prologues, and never stored.

    `wanted` holds the keywords of the primitive: prologue, want_x, want_weight, accumulate, reduce.
    """
    return _unit_backward(Incoming.pending(grad), x, weight, conv, **wanted)


@register("conv_backward", "triton", why_not=why_not_convolved, name="grad_formed")
def conv_backward_formed(
    grad: PendingGrad, x: Tensor, weight: Tensor, conv: Conv, **wanted: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward of a unit at level c': one pass forms grad_y, which both products then read.

    `wanted` holds the keywords of the primitive, as for `conv_backward_pending`.
    """
    (grad_y,), _ = bn_act_backward_apply(
        grad.grad_out, grad.gate, (grad.branch,), grad.sums, grad.values, want_grads=(True,)
    )
    assert grad_y is not None
    return _unit_backward(Incoming.formed(grad_y), x, weight, conv, **wanted)
