"""Schemas and abstract implementations of the `fastres::` operators.

Two functional operators run any block: one forward, one backward. The specification travels as a
line of text, the tensors as flat lists; what a list holds is said in `fastres.block.tensors`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.block.addition import add_backward, add_forward, add_metas
from fastres.block.backward import UNIT_NEEDS, UnitNeeds, run_backward
from fastres.block.flops import register_formulas
from fastres.block.forward import run_forward
from fastres.block.spec import decode
from fastres.block.tensors import Saved, output_metas, split_tensors
from fastres.kernels import acc_dtype, memory_format_of

Tensors = Sequence[Tensor | None]

_library = torch.library.Library("fastres", "DEF")
_library.define(
    "block_forward(Tensor x, Tensor? residual, Tensor?[] tensors, str spec) -> Tensor[]"
)
_library.define(
    "block_backward(Tensor grad_out, Tensor? grad_mean, Tensor x, Tensor?[] tensors, "
    "Tensor[] saved, str spec, bool[] needs) -> Tensor[]"
)
_library.define(
    "add_act(Tensor x, Tensor residual, str act, bool want_mask, str backend) -> Tensor[]"
)
_library.define(
    "add_act_backward(Tensor grad_out, Tensor mask, str act, bool channels_last, str backend) "
    "-> Tensor"
)


@torch.library.impl(_library, "block_forward", "CompositeExplicitAutograd")
def _block_forward(x: Tensor, residual: Tensor | None, tensors: Tensors, spec: str) -> list[Tensor]:
    return run_forward(decode(spec), x, residual, split_tensors(tensors))


@torch.library.register_fake("fastres::block_forward", lib=_library)
def _block_forward_fake(
    x: Tensor, residual: Tensor | None, tensors: Tensors, spec: str
) -> list[Tensor]:
    register_formulas(load=True)  # Who reads graphs may count in them.
    return output_metas(decode(spec), x, split_tensors(tensors))


@torch.library.impl(_library, "block_backward", "CompositeExplicitAutograd")
def _block_backward(
    grad_out: Tensor,
    grad_mean: Tensor | None,
    x: Tensor,
    tensors: Tensors,
    saved: Sequence[Tensor],
    spec: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    units = split_tensors(tensors)
    return run_backward(decode(spec), grad_out, grad_mean, x, units, saved, needs)


@torch.library.register_fake("fastres::block_backward", lib=_library)
def _block_backward_fake(
    grad_out: Tensor,
    grad_mean: Tensor | None,
    x: Tensor,
    tensors: Tensors,
    saved: Sequence[Tensor],
    spec: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients have the shape and layout of what they are gradients of; those of 1-d tensors the
    dtype of the statistics.
    """
    block, units = decode(spec), split_tensors(tensors)
    grads = [_like(x)] if needs[0] else []
    if needs[1]:
        grads.append(_empty(grad_out, memory_format_of(x, [u.weight for u in units])))
    stats, acc = Saved.unflatten(block, saved).stats, acc_dtype(x.dtype)
    for i, unit in enumerate(units):
        wants = UnitNeeds(*needs[2 + i * UNIT_NEEDS :][:UNIT_NEEDS])
        if wants.weight and unit.weight is not None:
            grads.append(_like(unit.weight))
        if wants.bias and unit.weight is not None:
            grads.append(x.new_empty(unit.weight.shape[:1], dtype=acc))
        norm = stats[i]
        if norm is not None:
            grads += [norm.new_empty(norm.shape[1:]) for want in wants[2:4] if want]
        if wants.factor and unit.factor is not None:
            grads.append(torch.empty_like(unit.factor, memory_format=torch.contiguous_format))
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
