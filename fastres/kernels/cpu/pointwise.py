"""The primitives around the convolutions, on the kernels of `csrc/cpu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.kernels.common import (
    ACT_CODES,
    DTYPE_CODES,
    address,
    gate_act_code,
    gate_code,
    new_mask,
)
from fastres.kernels.cpu.module import empty_like, module
from fastres.kernels.registry import Request, register
from fastres.kernels.types import Branch, Gate, is_channels_last

_kernels = module()


def why_not(request: Request) -> str | None:
    """Why these kernels do not take an activation, or None."""
    if request.device != "cpu":
        return f"it runs on the CPU, got {request.device}"
    if request.dtype not in DTYPE_CODES or request.dtype == torch.uint8:
        return f"dtype must be float32, bfloat16, float16 or float64, got {request.dtype}"
    if request.act not in ACT_CODES:
        return f"activation {request.act!r} has no CPU kernel"
    return None


def _sizes(t: Tensor) -> tuple[int, int, int, int, int, int]:
    """(n, c, hw, layout, dtype, threads): how the kernels are told about an activation."""
    n, c, h, w = t.shape
    # Where there are several channels and pixels, the strides alone tell the layouts apart.
    several = c > 1 and h * w > 1
    layout = int(t.stride(1) != 1) if several else int(not is_channels_last(t))
    return n, c, h * w, layout, DTYPE_CODES[t.dtype], torch.get_num_threads()


def coefficients(stats: Tensor | None) -> tuple[int, int]:
    """Where the rows of scale and shift are; 0 for none."""
    if stats is None:
        return 0, 0
    start, row = stats.data_ptr(), stats.shape[1] * stats.element_size()
    return start + 3 * row, start + 4 * row


def _gate(gate: Gate) -> tuple[int, int]:
    return gate_code(gate), 0 if gate.tensor is None else gate.tensor.data_ptr()


def _branches(branches: Sequence[Branch]) -> list[int]:
    """Addresses of y and stats of the first branch and of the second, 0 for none."""
    found = [
        0 if t is None else t.data_ptr() for branch in branches for t in (branch.y, branch.stats)
    ]
    return [*found, 0, 0, 0, 0][:4]


@register("channel_stats", "cpu", why_not=why_not)
def channel_stats(y: Tensor, state: Tensor | None = None, prior_count: int = 0) -> Tensor:
    """(mean, M2) per channel, float64 [2, C]; merged with `state` where it is given."""
    if state is None:
        state, prior_count = torch.empty(2, y.shape[1], dtype=torch.float64), 0
    else:
        state = state.clone()
    _kernels.channel_stats(y.data_ptr(), state.data_ptr(), prior_count, *_sizes(y))
    return state


@register("finalize_stats", "cpu", why_not=why_not)
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
    """`stats` [5, C] in `acc`, computed in float64."""
    mean, var = running or (None, None)
    known = mean if state is None else state
    if known is None:
        raise ValueError("one of state and running must be given, got neither")
    # The kernel reads them with a stride of 1; views of a larger tensor may have another.
    ready = [None if t is None else t.to(acc).contiguous() for t in (mean, var, weight, bias)]
    channels = known.shape[-1]
    stats = torch.empty(5, channels, dtype=acc)
    _kernels.finalize_stats(
        0 if state is None else state.data_ptr(), count,
        *[0 if t is None else t.data_ptr() for t in ready], eps, stats.data_ptr(), channels,
        DTYPE_CODES[acc],
    )  # fmt: skip
    return stats


@register("scale_shift_act", "cpu", why_not=why_not)
def scale_shift_act(
    y: Tensor,
    stats: Tensor,
    *,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    act: str = "none",
    want_mask: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """act(scale*y + shift [+ residual, plain or scaled]); `out` may be y."""
    out = empty_like(y) if out is None else out
    mask = new_mask(y) if want_mask else None
    _kernels.scale_shift_act(
        y.data_ptr(), *coefficients(stats),
        0 if residual is None else residual.data_ptr(), *coefficients(residual_stats),
        out.data_ptr(), 0 if mask is None else mask.data_ptr(), ACT_CODES[act], *_sizes(y),
    )  # fmt: skip
    return out, mask


@register("bn_act_backward_reduce", "cpu", why_not=why_not)
def bn_act_backward_reduce(
    grad_out: Tensor, gate: Gate, branches: Sequence[Branch], *, sums: Tensor | None = None
) -> Tensor:
    """`sums` float64 [3, C]; added to `sums` where it is given."""
    accumulate = sums is not None
    fresh = torch.empty(3, grad_out.shape[1], dtype=torch.float64)
    sums = fresh if sums is None else sums.clone()
    _kernels.bn_act_backward_reduce(
        grad_out.data_ptr(), *_gate(gate), *_branches(branches),
        sums.data_ptr(), accumulate, *_sizes(grad_out), gate_act_code(gate),
    )  # fmt: skip
    return sums


@register("bn_act_backward_apply", "cpu", why_not=why_not)
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
    grads: list[Tensor | None] = [empty_like(grad_out) if w else None for w in want_grads]
    if out is not None and want_grads[0]:
        grads[0] = out
    residual = empty_like(grad_out) if want_residual else None
    second = grads[1] if len(grads) > 1 else None
    _kernels.bn_act_backward_apply(
        grad_out.data_ptr(), *_gate(gate), *_branches(branches),
        address(sums) if count else 0, count,
        address(grads[0]), address(second), address(residual), *_sizes(grad_out),
        gate_act_code(gate),
    )  # fmt: skip
    return grads, residual


@register("add_act", "cpu", why_not=why_not)
def add_act(
    x: Tensor, residual: Tensor, *, act: str = "relu", want_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    """act(x + residual), and its mask."""
    out = empty_like(x)
    mask = new_mask(x) if want_mask else None
    _kernels.add_act(
        x.data_ptr(), residual.data_ptr(), out.data_ptr(), address(mask), ACT_CODES[act],
        *_sizes(x),
    )  # fmt: skip
    return out, mask


@register("act_backward", "cpu", why_not=why_not)
def act_backward(grad_out: Tensor, gate: Gate, *, out: Tensor | None = None) -> Tensor:
    """The gated gradient, into `out` where it is given."""
    out = empty_like(grad_out) if out is None else out
    _kernels.act_backward(
        grad_out.data_ptr(), *_gate(gate), out.data_ptr(), *_sizes(grad_out), gate_act_code(gate)
    )
    return out
