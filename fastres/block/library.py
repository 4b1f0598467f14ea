"""Schemas and abstract implementations of the `fastres::` operators.

Two functional operators run any block: one forward, one backward. The specification travels as a
line of text, the tensors as flat lists; what a list holds is said in `fastres.block.tensors`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.block.addition import add_backward, add_forward, add_metas
from fastres.block.backward import run_backward
from fastres.block.forward import run_forward
from fastres.block.spec import UNIT_TENSORS, decode
from fastres.block.tensors import output_metas, split_tensors
from fastres.kernels import memory_format_of

_library = torch.library.Library("fastres", "DEF")
_library.define(
    "block_forward(Tensor x, Tensor? residual, Tensor?[] tensors, str spec) -> Tensor[]"
)
_library.define(
    "block_backward(Tensor grad_out, Tensor x, Tensor?[] tensors, Tensor[] saved, str spec, "
    "bool[] needs) -> Tensor[]"
)
_library.define(
    "add_act(Tensor x, Tensor residual, str act, bool want_mask, str backend) -> Tensor[]"
)
_library.define(
    "add_act_backward(Tensor grad_out, Tensor mask, str act, bool channels_last, str backend) "
    "-> Tensor"
)


@torch.library.impl(_library, "block_forward", "CompositeExplicitAutograd")
def _block_forward(
    x: Tensor, residual: Tensor | None, tensors: Sequence[Tensor | None], spec: str
) -> list[Tensor]:
    return run_forward(decode(spec), x, residual, split_tensors(tensors))


@torch.library.register_fake("fastres::block_forward", lib=_library)
def _block_forward_fake(
    x: Tensor, residual: Tensor | None, tensors: Sequence[Tensor | None], spec: str
) -> list[Tensor]:
    return output_metas(decode(spec), x, split_tensors(tensors))


@torch.library.impl(_library, "block_backward", "CompositeExplicitAutograd")
def _block_backward(
    grad_out: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    spec: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    units = split_tensors(tensors)
    return run_backward(decode(spec), grad_out, x, units, saved, needs)


@torch.library.register_fake("fastres::block_backward", lib=_library)
def _block_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    spec: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients have the shape, dtype and layout of what they are gradients of."""
    grads = [_like(x)] if needs[0] else []
    if needs[1]:
        grads.append(_empty(grad_out, memory_format_of(x, tensors[::UNIT_TENSORS])))
    for unit in range(len(tensors) // UNIT_TENSORS):
        own = tensors[unit * UNIT_TENSORS :][:4]
        wanted = needs[2 + 4 * unit :][:4]
        grads += [_like(t) for t, want in zip(own, wanted, strict=True) if want and t is not None]
    return grads


def _like(t: Tensor) -> Tensor:
    return t.new_empty(t.shape) if t.dim() != 4 else _empty(t, memory_format_of(t))


def _empty(t: Tensor, fmt: torch.memory_format) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=fmt)


@torch.library.impl(_library, "add_act", "CompositeExplicitAutograd")
def _add_act(x: Tensor, residual: Tensor, act: str, want_mask: bool, backend: str) -> list[Tensor]:
    return add_forward(x, residual, act, want_mask, backend)


@torch.library.register_fake("fastres::add_act", lib=_library)
def _add_act_fake(
    x: Tensor, residual: Tensor, act: str, want_mask: bool, backend: str
) -> list[Tensor]:
    return add_metas(x, want_mask)


@torch.library.impl(_library, "add_act_backward", "CompositeExplicitAutograd")
def _add_act_backward(
    grad_out: Tensor, mask: Tensor, act: str, channels_last: bool, backend: str
) -> Tensor:
    return add_backward(grad_out, mask, act, channels_last, backend)


@torch.library.register_fake("fastres::add_act_backward", lib=_library)
def _add_act_backward_fake(
    grad_out: Tensor, mask: Tensor, act: str, channels_last: bool, backend: str
) -> Tensor:
    return _empty(grad_out, torch.channels_last if channels_last else torch.contiguous_format)
