"""The tensors of a block: what comes in per unit, and what forward keeps for backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.block.spec import UNIT_TENSORS, BlockSpec, UnitSpec
from fastres.kernels import acc_dtype, dense, mask_shape, memory_format_of


class UnitTensors(NamedTuple):
    """Parameters of one unit; running statistics only where they are used to normalise.

    weight [K, C/groups, kh, kw] or None; bias [K] or None; the others [K] or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


class UnitNeeds(NamedTuple):
    """Which of a unit's parameters want a gradient."""

    weight: bool
    bias: bool
    norm_weight: bool
    norm_bias: bool

    @property
    def affine(self) -> bool:
        """Whether the sums are needed for the batch norm's own parameters."""
        return self.norm_weight or self.norm_bias


def split_tensors(flat: Sequence[Tensor | None]) -> list[UnitTensors]:
    """Group the flat list that the operators take."""
    return [UnitTensors(*flat[i : i + UNIT_TENSORS]) for i in range(0, len(flat), UNIT_TENSORS)]


@dataclass
class Saved:
    """What forward keeps: lists follow `BlockSpec.all_units`; None where nothing is kept.

    Attributes:
        mask: packed gate of the block's end.
        stats: [5, C] per unit.
        raw: convolution outputs; None where the unit has no convolution or it is recomputed.
        activated: input of the next unit, for all but the last of the main path.
    """

    mask: Tensor | None = None
    stats: list[Tensor] = field(default_factory=list)
    raw: list[Tensor | None] = field(default_factory=list)
    activated: list[Tensor | None] = field(default_factory=list)

    def flatten(self) -> list[Tensor]:
        """The tensors that exist, in a fixed order: statistics first."""
        kept = [self.mask, *self.raw, *self.activated]
        return [*self.stats, *(t for t in kept if t is not None)]

    @classmethod
    def unflatten(cls, spec: BlockSpec, has_conv: Sequence[bool], flat: Sequence[Tensor]) -> Saved:
        """Inverse of `flatten`."""
        units, main = len(spec.all_units), len(spec.units)
        rest = iter(flat[units:])
        mask = next(rest) if spec.keeps_mask else None
        raw = [next(rest) if keeps_raw(spec, i) and has_conv[i] else None for i in range(units)]
        activated = [next(rest) if spec.keeps_activated else None for _ in range(main - 1)]
        return cls(mask, list(flat[:units]), raw, activated)


def keeps_raw(spec: BlockSpec, index: int) -> bool:
    """Whether the raw output of unit `index`'s convolution is kept for backward."""
    return spec.save and not (spec.recomputes_last and index == len(spec.units) - 1)


def pooled(spec: BlockSpec, x: Tensor, fmt: torch.memory_format) -> Tensor:
    """The projection's input: x, average-pooled where the specification says so."""
    return x if spec.pool is None else dense(spec.pool.apply(x), fmt)


def output_metas(spec: BlockSpec, x: Tensor, units: Sequence[UnitTensors]) -> list[Tensor]:
    """Empty tensors with the shapes, dtypes and strides of what the forward operator returns.

    Runs on fake tensors: it is the operator's abstract implementation.
    """
    fmt = memory_format_of(x, [u.weight for u in units])
    shapes = _raw_shapes(spec, x, units)

    def activation(shape: Sequence[int]) -> Tensor:
        return x.new_empty(shape, dtype=x.dtype).contiguous(memory_format=fmt)

    out = activation(shapes[len(spec.units) - 1])
    saved = Saved()
    saved.stats = [x.new_empty((5, shape[1]), dtype=acc_dtype(x.dtype)) for shape in shapes]
    if spec.keeps_mask:
        rows = mask_shape(out.shape, fmt == torch.channels_last)
        saved.mask = x.new_empty(rows, dtype=torch.uint8)
    saved.raw = [
        activation(shape) if u.weight is not None and keeps_raw(spec, i) else None
        for i, (shape, u) in enumerate(zip(shapes, units, strict=True))
    ]
    if spec.keeps_activated:
        saved.activated = [activation(s) for s in shapes[: len(spec.units) - 1]]
    return [out, *saved.flatten()]


def _raw_shapes(spec: BlockSpec, x: Tensor, units: Sequence[UnitTensors]) -> list[tuple[int, ...]]:
    """Shape of each unit's raw output."""
    weights = [None if u.weight is None else (*u.weight.shape,) for u in units]
    inputs = input_shapes(spec, x.shape, weights)
    return [
        _output_shape(unit, shape, weight)
        for unit, shape, weight in zip(spec.all_units, inputs, weights, strict=True)
    ]


def input_shapes(
    spec: BlockSpec, x_shape: Sequence[int], weights: Sequence[tuple[int, ...] | None]
) -> list[tuple[int, ...]]:
    """[N, C, H, W] that each unit is given; `weights` are the shapes of theirs."""
    shape, shapes = tuple(x_shape), []
    for unit, weight in zip(spec.units, weights, strict=False):
        shapes.append(shape)
        shape = _output_shape(unit, shape, weight)
    if spec.projection is not None:
        # Shapes alone: a meta tensor lets torch itself say what its pooling makes of them.
        meta = torch.empty(x_shape, device="meta")
        shapes.append(tuple(pooled(spec, meta, torch.contiguous_format).shape))
    return shapes


def _output_shape(
    unit: UnitSpec, shape: tuple[int, ...], weight: tuple[int, ...] | None
) -> tuple[int, ...]:
    if unit.conv is None or weight is None:
        return shape
    return (shape[0], weight[0], *unit.conv.output_size(shape[2:], weight[2:]))
