"""The `triton` backend: adapts the kernels of `fastres.triton_kernels`.

The residual addition and its backward are there; other primitives fall back to aten.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from fastres.backends.base import Backend, declare
from fastres.primitives import Gate, Request, is_channels_last, mask_shape, register


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_here() -> str | None:
    """None where Triton's kernels can run, else the reason and the remedy."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if not (torch.cuda.is_available() or interpreted()):
        return "there is no GPU that torch can use"
    return None


declare(Backend("triton", ("cuda", "cpu"), why_not=why_not_here, fallback=("aten",)))

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not(request: Request) -> str | None:
    if (reason := why_not_here()) is not None:
        return reason
    if request.device != "cuda" and not interpreted():
        return f"it runs on a GPU, got {request.device}"
    if request.dtype not in _DTYPES:
        return f"dtype must be float32, bfloat16 or float16, got {request.dtype}"
    return None if request.act in ("none", "relu") else f"activation {request.act!r} has no kernel"


def _matrix(t: Tensor) -> tuple[int, int, int]:
    """(rows, columns, mask bytes per row) of an activation in its own layout."""
    n, c, h, w = t.shape
    rows, row_bytes = mask_shape(t.shape, is_channels_last(t))
    return rows, n * c * h * w // max(rows, 1), row_bytes


@register("add_act", "triton", why_not=_why_not)
def add_act(
    x: Tensor, residual: Tensor, *, act: str = "relu", want_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    """act(x + residual), and its mask."""
    from fastres.triton_kernels import add_act as kernels

    out = torch.empty_like(x)
    rows, cols, row_bytes = _matrix(x)
    mask = torch.empty(rows, row_bytes, dtype=torch.uint8, device=x.device) if want_mask else None
    if x.numel() == 0:  # a grid of size zero must not be launched
        return out, mask
    blocks = kernels.tile_shape(cols)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernels.add_act_fwd_kernel[kernels.grid(rows, row_bytes, *blocks)](
            x, residual, out, mask, rows, cols, row_bytes, act == "relu", want_mask, *blocks
        )
    return out, mask


@register("act_backward", "triton", why_not=_why_not)
def act_backward(grad_out: Tensor, gate: Gate, *, out: Tensor | None = None) -> Tensor:
    """The gradient, gated by the mask's bits."""
    from fastres.triton_kernels import add_act as kernels

    if gate.kind == "none":
        return grad_out.clone()
    if gate.kind != "mask":
        raise NotImplementedError(f"gate must be mask or none, got {gate.kind}")
    out = torch.empty_like(grad_out) if out is None else out
    rows, cols, row_bytes = _matrix(grad_out)
    if grad_out.numel() == 0:
        return out
    blocks = kernels.tile_shape(cols)
    with torch.cuda.device_of(grad_out):
        kernels.act_bwd_kernel[kernels.grid(rows, row_bytes, *blocks)](
            grad_out, gate.tensor, out, rows, cols, row_bytes, *blocks
        )
    return out
