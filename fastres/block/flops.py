"""How many multiplications and additions a fused block has, as torch's FLOP counter counts them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.block.backward import needs_of
from fastres.block.spec import Block, decode
from fastres.block.tensors import input_shapes, output_shapes, split_tensors

_COUNTER = "torch.utils.flop_counter"
_registered = False

Shape = tuple[int, ...]
#: Of each unit that convolves: its place, and the shapes of input, weight and output.
_Conv = tuple[int, Shape, Shape, Shape]


def register_formulas(load: bool = False) -> None:
    """Tell torch's FLOP counter of the operators, once.

    Args:
        load: whether to import the counter, which loads a compiler, where nobody has yet.
    """
    global _registered
    if _registered or not (load or _COUNTER in sys.modules):
        return
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.fastres.block_forward, get_raw=True)(forward_flops)
    register_flop_formula(torch.ops.fastres.block_backward, get_raw=True)(backward_flops)
    _registered = True


def forward_flops(
    x: Tensor, residual: Tensor | None, tensors: Sequence[Tensor | None], spec: str, **more: Any
) -> int:
    """Those of `fastres::block_forward`: its convolutions'."""
    from torch.utils.flop_counter import conv_flop_count

    convs = _convolutions(decode(spec), x, tensors)
    return sum([conv_flop_count([*x], [*w], [*y]) for _, x, w, y in convs])


def backward_flops(
    grad_out: Tensor, grad_mean: Tensor | None, x: Tensor, tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor], spec: str, needs: Sequence[bool], **more: Any,
) -> int:  # fmt: skip
    """Those of `fastres::block_backward`: of the gradients that are wanted, and of a convolution
    that is computed again.
    """
    from torch.utils.flop_counter import conv_backward_flop, conv_flop_count

    block = decode(spec)
    wanted, flops = needs_of(block, tuple(needs)), 0
    for i, given, weight, out in _convolutions(block, x, tensors):
        mask = [wanted.below[i], wanted.units[i].weight, False]
        flops += conv_backward_flop(  # type: ignore[call-arg]
            out, given, weight, None, None, None, None, False, None, None, mask,
            out_val=(given, weight, None),
        )  # fmt: skip
        if block.recomputed[i]:
            flops += conv_flop_count([*given], [*weight], [*out])
    return flops


def _convolutions(block: Block, x: Tensor, tensors: Sequence[Tensor | None]) -> list[_Conv]:
    units = split_tensors(tensors)
    weights = [None if u.weight is None else tuple(u.weight.shape) for u in units]
    given, out = input_shapes(block, x.shape, weights), output_shapes(block, x.shape, weights)
    return [
        (i, given[i], weight, out[i])
        for i, (unit, weight) in enumerate(zip(block.all_units, weights, strict=True))
        if unit.conv is not None and weight is not None
    ]
