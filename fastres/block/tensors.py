"""The tensors of a block: what comes in per unit, and what forward keeps for backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.block.spec import UNIT_TENSORS, Block, Unit
from fastres.kernels import Prologue, acc_dtype, dense, mask_shape, memory_format_of


class UnitTensors(NamedTuple):
    """Tensors of one unit; running statistics only where they are used to normalise.

    weight [K, C/groups, kh, kw] or None; bias [K] or None; the norm's [K] or None. For statistics
    that are given, `running_mean` is all of them, [5, K]. factor [N, C or 1, 1, 1], of the full
    size, or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    factor: Tensor | None


class Act(NamedTuple):
    """An activation on its way: factor * act(scale*raw + shift), with `stats` for scale and shift.

    Attributes:
        raw: [N, C, H, W], as the convolution or the caller left it.
        stats: [5, C], or None where nothing is to be normalised.
        act: activation that is to be applied.
        factor: that is to be multiplied by, or None.
        value: the result, where it was formed already.
    """

    raw: Tensor
    stats: Tensor | None = None
    act: str = "none"
    factor: Tensor | None = None
    value: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing is left to apply."""
        return self.stats is None and self.act == "none" and self.factor is None

    @property
    def prologue(self) -> Prologue:
        """What a convolution would have to do to `raw` on the way in, but for the factor."""
        return Prologue(self.known_stats, self.act)

    @property
    def known_stats(self) -> Tensor:
        """`stats`, or those that leave every value as it is."""
        return identity_stats(self.raw) if self.stats is None else self.stats


def identity_stats(raw: Tensor) -> Tensor:
    """Statistics [5, C] of a normalisation that changes nothing.

    The shift is -0.0, so that not even the sign of a zero changes.
    """
    return _identity_stats(raw.shape[1], raw.device, acc_dtype(raw.dtype))


@lru_cache(maxsize=256)
def _identity_stats(channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.tensor([0.0, 1.0, 1.0, 1.0, -0.0], dtype=dtype, device=device)
        return rows.view(5, 1).expand(5, channels).contiguous()


def split_tensors(flat: Sequence[Tensor | None]) -> list[UnitTensors]:
    """Group the flat list that the operators take."""
    return [UnitTensors(*flat[i : i + UNIT_TENSORS]) for i in range(0, len(flat), UNIT_TENSORS)]


@dataclass(slots=True)
class Saved:
    """What forward keeps: lists follow `Block.all_units`; None where nothing is kept.

    Attributes:
        mask: packed derivative of the block's last activation.
        argmax: taps of the maxima, uint8 with the shape of the pooled output.
        stats: [5, C] per unit that has a norm.
        raw: convolution outputs; None where the unit has no convolution or it is recomputed.
        activated: input of the next unit, for all but the last of the main path.
    """

    mask: Tensor | None = None
    stats: list[Tensor | None] = field(default_factory=list)
    raw: list[Tensor | None] = field(default_factory=list)
    activated: list[Tensor | None] = field(default_factory=list)
    argmax: Tensor | None = None

    def flatten(self) -> list[Tensor]:
        """The tensors that exist, in a fixed order: statistics first."""
        kept = [*self.stats, self.mask, self.argmax, *self.raw, *self.activated]
        return [t for t in kept if t is not None]

    @classmethod
    def unflatten(cls, block: Block, flat: Sequence[Tensor]) -> Saved:
        """Inverse of `flatten`; the raw output of a block with an open end stands behind it."""
        rest = iter(flat)
        units = block.all_units
        stats = [next(rest) if unit.norm is not None else None for unit in units]
        mask = next(rest) if block.keeps_mask else None
        argmax = next(rest) if block.keeps_argmax else None
        raw = [next(rest) if block.keeps_raw[i] else None for i in range(len(units))]
        inner = range(len(block.units) - 1)
        activated = [next(rest) if block.keeps_value[i] else None for i in inner]
        if block.open_end:
            raw[len(block.units) - 1] = next(rest)
        return cls(mask, stats, raw, activated, argmax)


def pooled(block: Block, x: Tensor, fmt: torch.memory_format) -> Tensor:
    """The projection's input: its source, average-pooled where the specification says so."""
    return x if block.pool is None else dense(block.pool.apply(x), fmt)


def output_metas(block: Block, x: Tensor, units: Sequence[UnitTensors]) -> list[Tensor]:
    """Empty tensors with the shapes, dtypes and strides of what the forward operator returns.

    Runs on fake tensors: it is the operator's abstract implementation.
    """
    weights = [u.weight for u in units]
    fmt = memory_format_of(x, weights)
    shapes = output_shapes(block, x.shape, [None if w is None else (*w.shape,) for w in weights])
    main, acc = len(block.units), acc_dtype(x.dtype)

    def activation(shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return x.new_empty(shape, dtype=dtype).contiguous(memory_format=fmt)

    out = activation(block_shape(block, shapes[main - 1]))
    saved = Saved()
    saved.stats = [
        None if unit.norm is None else x.new_empty((5, shape[1]), dtype=acc)
        for unit, shape in zip(block.all_units, shapes, strict=True)
    ]
    if block.keeps_mask:
        rows = mask_shape(out.shape, fmt == torch.channels_last)
        saved.mask = x.new_empty(rows, dtype=torch.uint8)
    if block.keeps_argmax:
        saved.argmax = activation(out.shape, torch.uint8)
    saved.raw = [
        activation(shape) if block.keeps_raw[i] else None for i, shape in enumerate(shapes)
    ]
    saved.activated = [
        activation(shape) if block.keeps_value[i] else None
        for i, shape in enumerate(shapes[: main - 1])
    ]
    found = [out, *saved.flatten()]
    if block.open_end:
        found.insert(1, x.new_empty(out.shape[:2], dtype=acc))
    return found


def input_shapes(
    block: Block, x_shape: Sequence[int], weights: Sequence[tuple[int, ...] | None]
) -> list[tuple[int, ...]]:
    """[N, C, H, W] that each unit is given; `weights` are the shapes of theirs."""
    shape, shapes = tuple(x_shape), []
    for unit, weight in zip(block.units, weights, strict=False):
        shapes.append(shape)
        shape = _output_shape(unit, shape, weight)
    if block.projection is not None:
        shapes.append(pooled_shape(block, tuple(x_shape)))
    return shapes


def output_shapes(
    block: Block, x_shape: Sequence[int], weights: Sequence[tuple[int, ...] | None]
) -> list[tuple[int, ...]]:
    """[N, C, H, W] that each unit gives."""
    given = input_shapes(block, x_shape, weights)
    units = zip(block.all_units, given, weights, strict=True)
    return [_output_shape(unit, shape, weight) for unit, shape, weight in units]


def block_shape(block: Block, last: tuple[int, ...]) -> tuple[int, ...]:
    """[N, C, H, W] of the block's output; `last` is the shape that its last unit gives."""
    if block.max_pool is None:
        return last
    return (*last[:2], *block.max_pool.output_size(last[2:]))


def pooled_shape(block: Block, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What pooling makes of a shape: a meta tensor lets torch itself say it."""
    if block.pool is None:
        return shape
    return tuple(block.pool.apply(torch.empty(shape, device="meta")).shape)


def _output_shape(
    unit: Unit, shape: tuple[int, ...], weight: tuple[int, ...] | None
) -> tuple[int, ...]:
    if unit.conv is None or weight is None:
        return shape
    return (shape[0], weight[0], *unit.conv.output_size(shape[2:], weight[2:]))
