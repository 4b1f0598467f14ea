"""The plain residual addition with its activation, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels import (
    Gate,
    Implementation,
    Request,
    dense,
    mask_shape,
    memory_format_of,
    preference,
    select,
)


def _choose(
    primitive: str, x: Tensor, fmt: torch.memory_format, act: str, backend: str
) -> Implementation:
    request = Request(x.device.type, x.dtype, fmt == torch.channels_last, act)
    found, reasons = select(primitive, preference(backend, x.device.type), request)
    if found is None:
        raise NotImplementedError(
            f"backend {backend!r} cannot run {primitive}: {'; '.join(reasons)}"
        )
    return found


def add_forward(
    x: Tensor, residual: Tensor, act: str, want_mask: bool, backend: str
) -> list[Tensor]:
    """[act(x + residual)] and, on demand, the packed mask of the activation."""
    fmt = memory_format_of(x)
    run = _choose("add_act", x, fmt, act, backend).run
    out, mask = run(dense(x, fmt), dense(residual, fmt), act=act, want_mask=want_mask)
    return [out, mask] if want_mask else [out]


def add_metas(x: Tensor, want_mask: bool) -> list[Tensor]:
    """Empty tensors with the shapes and strides of `add_forward`'s results."""
    fmt = memory_format_of(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=fmt)
    if not want_mask:
        return [out]
    rows = mask_shape(x.shape, fmt == torch.channels_last)
    return [out, torch.empty(rows, dtype=torch.uint8, device=x.device)]


def add_backward(
    grad_out: Tensor, mask: Tensor, act: str, channels_last: bool, backend: str
) -> Tensor:
    """The gradient of both inputs, in the layout whose rows the mask packs."""
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    run = _choose("act_backward", grad_out, fmt, act, backend).run
    return run(dense(grad_out, fmt), Gate("mask", mask, act))
