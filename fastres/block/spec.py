"""Block: what a residual block computes, apart from its tensors.

A specification is plain data, and one line of text to the operators: `encode` and `decode`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.kernels import Conv, MaxPool, activation

#: Tensors that one unit brings: weight, bias, norm_weight, norm_bias, running_mean, running_var,
#: factor.
UNIT_TENSORS = 7

#: Where the shortcut comes from: nowhere; the block's input; the output of the first unit, which is
#: then a norm and an activation without a convolution; a tensor given.
SHORTCUTS = ("none", "input", "activated", "tensor")

#: Levels of fusion, docs/design.md section 6: what is fused into the convolutions.
LEVELS = ("b", "b'", "c'", "c")


class Norm(NamedTuple):
    """A batch norm: `eps`, and whose statistics normalise.

    `source` is "batch"; "running"; or "given" for statistics [5, C] that a block before this one
    left unapplied, together with its raw output.
    """

    eps: float
    source: str = "batch"


class _UnitFields(NamedTuple):
    conv: Conv | None = None
    norm: Norm | None = None
    act: str = "none"
    scale: bool = False


class Unit(_UnitFields):
    """Steps in the order of the data: convolve, normalise, activate, scale; each may be missing.

    `scale` multiplies by a factor that is given: [N, C or 1, 1, 1] per image and channel (squeeze
    and excite, stochastic depth), or one of the full size (dropout).
    """

    @cached_property
    def batch_stats(self) -> bool:
        """Whether the statistics of its batch normalise."""
        return self.norm is not None and self.norm.source == "batch"

    @cached_property
    def scaled_norm(self) -> bool:
        """Whether it normalises a raw output itself, rather than go by what was left to it."""
        return self.norm is not None and self.norm.source != "given"

    @cached_property
    def plain(self) -> bool:
        """Whether nothing follows the convolution."""
        return self.norm is None and self.act == "none" and not self.scale


class PoolSpec(NamedTuple):
    """Average pooling in front of a projection (ResNet-D), with torch's avg_pool2d semantics."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool
    count_include_pad: bool

    def apply(self, x: Tensor) -> Tensor:
        """x [N, C, H, W], average-pooled."""
        kernel, stride, padding, ceil_mode, count_include_pad = self
        return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad)


class _Fields(NamedTuple):
    units: tuple[Unit, ...]
    shortcut: str = "none"
    projection: Unit | None = None
    pool: PoolSpec | None = None
    act: str = "none"
    max_pool: MaxPool | None = None
    open_end: bool = False
    save: bool = False
    memory: str = "speed"
    backend: str = "auto"
    level: str = "auto"
    unread: tuple[int, ...] = ()
    unread_values: tuple[int, ...] = ()


class Block(_Fields):
    """A chain of units, a shortcut, and an activation after their sum.

    Attributes:
        units: the main path, in order. Where there is no shortcut, the activation of the last unit
            is the block's `act`, and its own is "none".
        shortcut: one of `SHORTCUTS`.
        projection: convolution and perhaps norm of the shortcut, or None.
        pool: average pooling in front of the projection, or None.
        act: activation at the end of the block.
        max_pool: max pooling behind that, or None; only where there is no shortcut and `simple_end`
            holds. What is pooled is never stored: a backward goes by the taps of the maxima.
        open_end: whether the last unit's norm is left to the next block: the operator returns the
            raw output of the last convolution, its statistics, and the normalised output's mean
            per image and channel.
        save: whether anything is kept for a backward.
        memory: "speed", "balanced" or "lean".
        backend: the user's choice, "auto" or a backend's name.
        level: the level of fusion, of `LEVELS`, or "auto" for what is fastest.
        unread: units whose raw output no backward reads, so that it is not kept.
        unread_values: units whose activated output no backward reads.
    """

    @cached_property
    def all_units(self) -> tuple[Unit, ...]:
        """Main path and projection, in the order of their tensors."""
        return self.units if self.projection is None else (*self.units, self.projection)

    @cached_property
    def batch_stats(self) -> bool:
        """Whether anything is normalised by the statistics of its batch."""
        return any([unit.batch_stats for unit in self.all_units])

    @cached_property
    def simple_end(self) -> bool:
        """Whether nothing stands between the last unit's norm and the sum."""
        return self.units[-1].act == "none" and not self.units[-1].scale

    @cached_property
    def adds_input(self) -> bool:
        """Whether the shortcut is the block's input as it is."""
        return self.shortcut == "input" and self.projection is None

    @cached_property
    def keeps_mask(self) -> bool:
        """A sum with a shortcut, or a scaled output, cannot be recomputed from one branch: the
        derivative of the activation behind it is kept as bits.
        """
        norm = self.units[-1].norm
        given = norm is not None and norm.source == "given"
        last = len(self.units) - 1
        recomputed = self.shortcut == "none" and self.simple_end and not given
        recomputed = recomputed and last not in self.unread
        return self.save and self.act != "none" and not recomputed

    @cached_property
    def keeps_argmax(self) -> bool:
        """Whether the taps are kept that the pooled maxima came from."""
        return self.save and self.max_pool is not None

    @cached_property
    def keeps_activated(self) -> bool:
        """Whether the activated tensors between units are kept, or recomputed in backward."""
        return self.save and self.memory == "speed"

    @cached_property
    def recomputed(self) -> tuple[bool, ...]:
        """Whether each unit's raw output is computed again in backward: "lean" does so with those
        that the block's end reads, the widest.
        """
        last = len(self.units) - 1
        lean = self.save and self.memory == "lean" and not self.open_end and last > 0
        return tuple(
            [
                lean and i >= last and unit.conv is not None and i not in self.unread
                for i, unit in enumerate(self.all_units)
            ]
        )

    @cached_property
    def keeps_value(self) -> tuple[bool, ...]:
        """Whether the activated output of each inner unit is kept for backward."""
        return tuple(
            [
                self.keeps_activated and not unit.plain and i not in self.unread_values
                for i, unit in enumerate(self.units[:-1])
            ]
        )

    @cached_property
    def keeps_raw(self) -> tuple[bool, ...]:
        """Whether the raw output of each unit's convolution is kept for backward, apart from one
        that is the block's own output.
        """
        left_out = (*self.unread, *[len(self.units) - 1 for _ in range(self.open_end)])
        return tuple(
            [
                self.save and unit.conv is not None and not (again or i in left_out)
                for i, (unit, again) in enumerate(zip(self.all_units, self.recomputed, strict=True))
            ]
        )

    def encode(self) -> str:
        """The specification as one line, the inverse of `decode`.

        Raises:
            ValueError: for an unknown activation, with the known ones.
        """
        # A compiler sees through the function, not through its cache.
        return _encoded(self) if torch.compiler.is_compiling() else _encoded_once(self)


def _encoded(block: Block) -> str:
    for act in (block.act, *[unit.act for unit in block.all_units]):
        activation(act)
    return _json(block)


_encoded_once = lru_cache(maxsize=4096)(_encoded)


def _json(value: Any) -> str:
    """json.dumps, in terms that torch.compile can trace."""
    if isinstance(value, tuple):
        return "[" + ",".join([_json(part) for part in value]) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    return "Infinity" if value == float("inf") else repr(value)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    h, w = values
    return h, w


def _unit_of(value: Any) -> Unit | None:
    if value is None:
        return None
    conv, norm, act, scale = value
    activation(act)
    if conv is not None:
        stride, padding, dilation, groups = conv
        conv = Conv(_pair(stride), _pair(padding), _pair(dilation), groups)
    return Unit(conv, None if norm is None else Norm(*norm), act, scale)


@lru_cache(maxsize=4096)
def decode(text: str) -> Block:
    """The specification that `Block.encode` wrote.

    Raises:
        ValueError: for an unknown activation, with the known ones.
    """
    units, shortcut, projection, pool, act, max_pool, *rest = json.loads(text)
    activation(act)
    if pool is not None:
        kernel, stride, padding, *flags = pool
        pool = PoolSpec(_pair(kernel), _pair(stride), _pair(padding), *flags)
    if max_pool is not None:
        kernel, stride, padding, dilation, ceil_mode = max_pool
        sizes = _pair(kernel), _pair(stride), _pair(padding), _pair(dilation)
        max_pool = MaxPool(*sizes, ceil_mode)
    main = tuple([unit for value in units if (unit := _unit_of(value)) is not None])
    *rest, unread, values = rest
    block = Block(main, shortcut, _unit_of(projection), pool, act, max_pool, *rest)
    return block._replace(unread=tuple(unread), unread_values=tuple(values))
