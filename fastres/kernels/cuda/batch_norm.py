"""The primitives around the convolutions: statistics, normalisation, and their backward."""

from __future__ import annotations

from collections.abc import Sequence

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
    new_grads,
    new_mask,
    zeros,
)
from fastres.kernels.cuda.module import module, where, why_not
from fastres.kernels.cuda.tiling import Shape, Tiling, choose, partials
from fastres.kernels.registry import register
from fastres.kernels.types import Branch, Gate


@register("channel_stats", "cuda", why_not=why_not)
def channel_stats(y: Tensor, state: Tensor | None = None, prior_count: int = 0) -> Tensor:
    """(mean, M2) per channel, float32 [2, C]; merged with `state` where it is given."""
    channels = y.shape[1]
    if y.numel() == 0:
        return zeros(2, channels, device=y.device) if state is None else state.clone()
    found = floats(2, channels, device=y.device)
    _statistics(y, (address(state), prior_count, found.data_ptr(), 0, 0, 0.0, 0))
    return found


def batch_stats(y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`stats` float32 [5, C] of y as a batch; weight and bias dense, in float32."""
    channels = y.shape[1]
    if y.numel() == 0:
        state = channel_stats(y)
        return finalize_stats(state, 0, None, weight, bias, eps, acc=torch.float32)
    stats = floats(5, channels, device=y.device)
    _statistics(y, (0, 0, 0, address(weight), address(bias), eps, stats.data_ptr()))
    return stats


def _statistics(y: Tensor, wanted: tuple[float, ...]) -> None:
    """Launch the reduction; `wanted` says what to join, and what to make of it."""

    shape = Shape.of(y)

    def run(tiling: Tiling) -> None:
        parts = partials(shape, tiling, 2, torch.float64, y.device)
        module().channel_stats(y.data_ptr(), parts.data_ptr(), *wanted, shape, tiling, where(y))

    run(choose("channel_stats", shape, y.device, (), run, sums=True))


@register("finalize_stats", "cuda", why_not=why_not)
def finalize_stats(
    state: Tensor | None,
    count: int,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    acc: torch.dtype,
) -> Tensor:
    """`stats` float32 [5, C], computed in float64."""
    mean, var = running or (None, None)
    given = [dense_float(t) for t in (state, mean, var, weight, bias)]
    some = next(t for t in given if t is not None)
    channels = some.shape[-1]
    stats = floats(5, channels, device=some.device)
    if channels == 0:
        return stats
    first, *others = map(address, given)
    module().finalize_stats(first, count, *others, eps, stats.data_ptr(), channels, where(some))
    return stats


def dense_float(t: Tensor | None) -> Tensor | None:
    """As the kernels read a parameter: views of it may be strided, and its dtype another."""
    return None if t is None else t.to(torch.float32).contiguous()


@register("scale_shift_act", "cuda", why_not=why_not)
def scale_shift_act(
    y: Tensor,
    stats: Tensor | None,
    *,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    act: str = "none",
    want_mask: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """act(scale*y + shift [+ residual, plain or scaled]); `out` may be y.

    Without `stats` y is taken as it is.
    """
    shape, in_place = Shape.of(y), out is not None
    found = torch.empty_like(y) if out is None else out
    mask = new_mask(y) if want_mask else None
    if shape.empty:
        return found, mask

    def run(tiling: Tiling) -> None:
        module().scale_shift_act(
            y.data_ptr(), address(stats), address(residual), address(residual_stats),
            found.data_ptr(), address(mask), ACT_CODES[act], shape, tiling, where(y),
        )  # fmt: skip

    given = (stats is None, residual is None, residual_stats is None, act, want_mask)
    run(choose("scale_shift_act", shape, y.device, given, None if in_place else run))
    return found, mask


@register("bn_act_backward_reduce", "cuda", why_not=why_not)
def bn_act_backward_reduce(
    grad_out: Tensor, gate: Gate, branches: Sequence[Branch], *, sums: Tensor | None = None
) -> Tensor:
    """`sums` float32 [3, C]; added to `sums` where it is given."""
    gate = as_relu(gate)
    shape, device = Shape.of(grad_out), grad_out.device
    if shape.empty:
        return zeros(3, shape.c, device=device) if sums is None else sums.clone()
    rows = 1 + len(branches)

    def run(tiling: Tiling) -> Tensor:
        found = floats(3, shape.c, device=device)
        parts = partials(shape, tiling, rows, torch.float32, device)
        module().bn_act_backward_reduce(
            grad_out.data_ptr(), gate_code(gate), gate_act_code(gate), address(gate.tensor),
            *map(address, branch_tensors(branches)), parts.data_ptr(), address(sums),
            found.data_ptr(), shape, tiling, where(grad_out),
        )  # fmt: skip
        return found

    flags = (gate.kind, gate.applied, rows)
    name = "bn_act_backward_reduce"
    return run(choose(name, shape, device, flags, run, sums=True, rings=True))


@register("bn_act_backward_apply", "cuda", why_not=why_not)
def bn_act_backward_apply(
    grad_out: Tensor,
    gate: Gate,
    branches: Sequence[Branch],
    sums: Tensor,
    count: int,
    *,
    want_grads: Sequence[bool],
    want_residual: bool = False,
    out: Tensor | None = None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """grad_y per branch, and the gated gradient itself on demand, in one pass."""
    grads = new_grads(grad_out, want_grads, out)
    residual = torch.empty_like(grad_out) if want_residual else None
    apply(
        grad_out, gate, branches, sums if count else None, count, (*grads, None)[:2], residual,
        in_place=out is not None,
    )  # fmt: skip
    return grads, residual


def apply(
    grad_out: Tensor,
    gate: Gate,
    branches: Sequence[Branch],
    sums: Tensor | None,
    count: int,
    grads: Sequence[Tensor | None],
    residual: Tensor | None,
    *,
    in_place: bool,
) -> None:
    """Write grad_y of both branches and the gated gradient, where there is memory for them."""
    gate = as_relu(gate)
    shape = Shape.of(grad_out)
    if shape.empty:
        return

    def run(tiling: Tiling) -> None:
        module().bn_act_backward_apply(
            grad_out.data_ptr(), gate_code(gate), gate_act_code(gate), address(gate.tensor),
            *map(address, branch_tensors(branches)), address(sums), count,
            *map(address, grads), address(residual), shape, tiling, where(grad_out),
        )  # fmt: skip

    absent = [t is None for t in (sums, *grads, residual)]
    wanted: tuple[str | bool, ...] = (gate.kind, gate.applied, *absent)
    repeatable = None if in_place else run
    name = "bn_act_backward_apply"
    run(choose(name, shape, grad_out.device, wanted, repeatable, rings=True))
