"""Batch norm as a whole, forward and backward: in passes of their own, or slab by slab of channels.

A slab is small enough for L2: what reduces it and what then normalises it read memory once. Which
way is faster depends on the tensor and the GPU, and is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels.common import (
    ACT_CODES,
    address,
    as_relu,
    branch_tensors,
    floats,
    gate_act_code,
    gate_code,
    new_mask,
)
from fastres.kernels.cuda.batch_norm import (
    batch_stats,
    bn_act_backward_apply,
    bn_act_backward_reduce,
    dense_float,
    scale_shift_act,
)
from fastres.kernels.cuda.module import binary, cache_bytes, module, where, why_not
from fastres.kernels.cuda.tiling import Shape, Tiling, partials, slab_tilings
from fastres.kernels.registry import register
from fastres.kernels.tuned import tuned
from fastres.kernels.types import Branch, Gate

#: The way in several passes, which is taken where nothing was measured.
PASSES = "passes"

Way = Tiling | str


@lru_cache(maxsize=64)
def _resident(direction: str, dtype: int, second: bool, device: torch.device) -> int:
    """The most blocks that wait for each other on a device."""
    blocks = getattr(module(), f"bn_act_{direction}_blocks")
    found: int = blocks(dtype, second, (device.index or 0, 0))
    return found


def ways(direction: str, tensors: Sequence[Tensor | None], second: bool) -> tuple[Way, ...]:
    """How a batch norm can be run, in a direction; `second`: with two branches.

    `tensors` are the activations that it reads, the one that is normalised first. Slabs take
    vectors of all of them. Beside other processes of a distributed run there are none: their
    launch waits until the whole grid fits, and so for a collective that holds multiprocessors.
    """
    first = next(t for t in tensors if t is not None)
    shape = Shape.of(first)
    whole = all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    if shape.empty or not shape.vectors or not whole or _distributed():
        return (PASSES,)
    bytes_per_value = first.element_size() * sum(t is not None for t in tensors)
    blocks = _resident(direction, shape.dtype, second, first.device)
    return PASSES, *slab_tilings(shape, blocks, cache_bytes(first.device) // bytes_per_value)


def _distributed() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


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
    affine = (dense_float(weight), dense_float(bias), eps)
    end: dict[str, Any] = {"residual": residual, "residual_stats": residual_stats}
    end |= {"act": act, "want_mask": want_mask}

    def run(way: Way) -> Forward:
        if isinstance(way, Tiling):
            return forward_in_slabs(y, *affine, way, **end)
        stats = batch_stats(y, *affine)
        return Forward(stats, *scale_shift_act(y, stats, **end))

    given = (act, want_mask, residual is None, residual_stats is None)
    candidates = ways("forward", (y, residual), residual_stats is not None)
    name, sizes = "cuda/bn_act_forward", (*Shape.of(y), *given)
    return run(tuned(name, binary(), sizes, candidates, run, y.device))


def forward_in_slabs(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tiling: Tiling,
    *,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    act: str,
    want_mask: bool,
) -> Forward:
    """`bn_act_forward`, one slab after the other."""
    stats = floats(5, y.shape[1], device=y.device)
    out, mask = torch.empty_like(y), new_mask(y) if want_mask else None
    shape = Shape.of(y)
    parts = partials(shape, tiling, 2, torch.float64, y.device)
    module().bn_act_forward(
        y.data_ptr(), parts.data_ptr(), address(weight), address(bias), eps, stats.data_ptr(),
        address(residual), address(residual_stats), out.data_ptr(), address(mask),
        ACT_CODES[act], shape, tiling, where(y),
    )  # fmt: skip
    return Forward(stats, out, mask)


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
    gate = as_relu(gate)

    def run(way: Way) -> Backward:
        if isinstance(way, Tiling):
            return backward_in_slabs(grad_out, gate, branches, count, way, want_residual)
        sums = bn_act_backward_reduce(grad_out, gate, branches)
        wanted = [True] * len(branches)
        found = bn_act_backward_apply(
            grad_out, gate, branches, sums, count, want_grads=wanted, want_residual=want_residual
        )
        return Backward(sums, *found)

    read = (grad_out, *(branch.y for branch in branches))
    candidates = ways(
        "backward", (*read, gate.tensor if gate.kind == "out" else None), len(branches) > 1
    )
    name = "cuda/bn_act_backward"
    sizes = (*Shape.of(grad_out), gate.kind, gate.applied, len(branches), count > 0, want_residual)
    return run(tuned(name, binary(), sizes, candidates, run, grad_out.device))


def backward_in_slabs(
    grad_out: Tensor,
    gate: Gate,
    branches: Sequence[Branch],
    count: int,
    tiling: Tiling,
    want_residual: bool,
) -> Backward:
    """`bn_act_backward`, one slab after the other."""
    sums = floats(3, grad_out.shape[1], device=grad_out.device)
    grads: list[Tensor | None] = [torch.empty_like(grad_out) for _ in branches]
    residual = torch.empty_like(grad_out) if want_residual else None
    shape = Shape.of(grad_out)
    parts = partials(shape, tiling, 1 + len(branches), torch.float32, grad_out.device)
    module().bn_act_backward(
        grad_out.data_ptr(), gate_code(gate), gate_act_code(gate), address(gate.tensor),
        *map(address, branch_tensors(branches)), parts.data_ptr(), sums.data_ptr(), count,
        *map(address, (*grads, None)[:2]), address(residual),
        shape, tiling, where(grad_out),
    )  # fmt: skip
    return Backward(sums, grads, residual)
