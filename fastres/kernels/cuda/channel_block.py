"""Batch norm as a whole, forward and backward: in passes, or one L2 channel block at a time.

A channel block is small enough for the L2 cache: the reduction over it and the normalisation behind
that read memory once. Which is faster depends on the tensor and the GPU, and is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.common import ACT_CODES, as_relu, floats, new_mask
from fastres.kernels.cuda.batch_norm import (
    as_float,
    backward_inputs,
    batch_stats,
    bn_act_backward_reduce,
    launches,
)
from fastres.kernels.cuda.module import binary, cache_bytes, launch, module, why_not
from fastres.kernels.cuda.tiling import Shape, Tiling, channel_block_tilings, partials
from fastres.kernels.pointwise import Gradients, Normalisation
from fastres.kernels.registry import register
from fastres.kernels.tape import taping
from fastres.kernels.tuned import tuned
from fastres.kernels.types import Branch, Gate

#: The variant in several passes, which is taken where nothing was measured.
PASSES = "passes"

Variant = Tiling | str


@lru_cache(maxsize=64)
def _resident(direction: str, dtype: int, second: bool, device: torch.device) -> int:
    """The most blocks that wait for each other on a device."""
    blocks: int = getattr(module(), f"bn_act_{direction}_blocks")(
        dtype, second, (device.index or 0, 0)
    )
    return blocks


def variants(direction: str, tensors: Sequence[Tensor | None], second: bool) -> tuple[Variant, ...]:
    """How a batch norm can be run, in a direction; `second`: with two branches.

    `tensors` are the activations that it reads, the one that is normalised first. Channel blocks
    take vectors of all of them. Beside other processes of a distributed run there are none: their
    launch waits until the whole grid fits, and so for a collective that holds multiprocessors.
    """
    first = next(t for t in tensors if t is not None)
    shape = Shape.of(first)
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    if first.numel() == 0 or not shape.whole_vectors or not aligned or _distributed():
        return (PASSES,)
    bytes_per_value = first.element_size() * sum(t is not None for t in tensors)
    blocks = _resident(direction, shape.dtype, second, first.device)
    values = cache_bytes(first.device) // bytes_per_value
    return PASSES, *channel_block_tilings(shape, blocks, values)


def _distributed() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _hold(tensors: Sequence[Tensor | None]) -> None:
    """Tell a program that is being written down what channel blocks depend on."""
    if (tape := taping()) is not None:
        tape.holds(tensors, unless=_distributed)


class Forward(NamedTuple):
    """`stats` float32 [5, C], the activated output, and its mask where that was wanted."""

    stats: Tensor
    out: Tensor
    mask: Tensor | None


@register("bn_act_forward", "cuda", why_not=why_not)
def bn_act_forward(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    act: str = "none",
    want_mask: bool = False,
) -> Forward:
    """channel_stats, finalize_stats and scale_shift_act of y, with batch statistics."""
    weight, bias, shape = as_float(weight), as_float(bias), Shape.of(y)
    out, mask = torch.empty_like(y), new_mask(y) if want_mask else None

    def run(variant: Variant) -> Tensor:
        if not isinstance(variant, Tiling):
            stats = batch_stats(y, weight, bias, eps)
            if y.numel():
                call = Normalisation(y, stats, residual, residual_stats, act, out, mask)
                launches.scale_shift_act(call)
            return stats
        stats = floats(5, y.shape[1], device=y.device)
        parts = partials(shape, variant, 2, torch.float64, y.device)
        launch(
            "bn_act_forward", y, y, parts, weight, bias, eps, stats, residual, residual_stats, out,
            mask, ACT_CODES[act], shape, variant,
        )  # fmt: skip
        _hold((y, residual))
        return stats

    flags = (act, want_mask, residual is None, residual_stats is None)
    candidates = variants("forward", (y, residual), residual_stats is not None)
    name, sizes = "cuda/bn_act_forward", (*shape, *flags)
    return Forward(run(tuned(name, binary(), sizes, candidates, run, y.device)), out, mask)


class Backward(NamedTuple):
    """`sums` float32 [3, C], grad_y per branch, and the gated gradient where it was wanted."""

    sums: Tensor
    grads: list[Tensor | None]
    residual: Tensor | None


@register("bn_act_backward", "cuda", why_not=why_not)
def bn_act_backward(
    grad_out: Tensor,
    gate: Gate,
    branches: Sequence[Branch],
    count: int,
    *,
    want_residual: bool = False,
) -> Backward:
    """bn_act_backward_reduce and bn_act_backward_apply, with grad_y of every branch."""
    gate, shape, second = as_relu(gate), Shape.of(grad_out), len(branches) > 1
    grads: list[Tensor | None] = [torch.empty_like(grad_out) for _ in branches]
    residual = torch.empty_like(grad_out) if want_residual else None
    both = grads[0], grads[1] if second else None

    def run(variant: Variant) -> Tensor:
        if not isinstance(variant, Tiling):
            sums = bn_act_backward_reduce(grad_out, gate, branches)
            if grad_out.numel():
                used = sums if count else None
                call = Gradients(grad_out, gate, branches, used, count, both, residual)
                launches.bn_act_backward_apply(call)
            return sums
        sums = floats(3, grad_out.shape[1], device=grad_out.device)
        parts = partials(shape, variant, 1 + len(branches), torch.float32, grad_out.device)
        inputs = backward_inputs(grad_out, gate, branches)
        outputs = (*both, residual, shape, variant)
        launch("bn_act_backward", grad_out, *inputs, parts, sums, count, *outputs)
        _hold(read)
        return sums

    output = gate.tensor if gate.kind == "out" else None
    read = (grad_out, *(branch.y for branch in branches), output)
    candidates = variants("backward", read, second)
    name = "cuda/bn_act_backward"
    sizes = (*shape, gate.kind, gate.applied, len(branches), count > 0, want_residual)
    sums = run(tuned(name, binary(), sizes, candidates, run, grad_out.device))
    return Backward(sums, grads, residual)
