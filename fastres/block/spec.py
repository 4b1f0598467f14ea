"""BlockSpec: what a residual block computes, apart from its tensors.

A specification is plain data, and one line of text to the operators: `encode` and `decode`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from fastres.kernels import ConvSpec, activation

#: Tensors that one unit brings: weight, bias, norm_weight, norm_bias, running_mean, running_var.
UNIT_TENSORS = 6

SHORTCUTS = ("none", "identity", "tensor", "projection")

#: Levels of fusion, docs/design.md section 6: what is fused into the convolutions.
LEVELS = ("b", "b'", "c'", "c")


class UnitSpec(NamedTuple):
    """[convolution +] batch norm + activation; `conv` None is a batch norm alone."""

    conv: ConvSpec | None
    eps: float
    batch_stats: bool
    act: str


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


class BlockSpec(NamedTuple):
    """A chain of units, a shortcut, and an activation after their sum.

    Attributes:
        units: the main path, in order; the last one's own `act` is "none" where a shortcut is
            added, and the block's `act` follows the addition.
        shortcut: "none"; "identity" (x); "tensor" (a residual given); "projection".
        projection: the shortcut's convolution and batch norm, for "projection".
        pool: average pooling in front of the projection, or None.
        act: activation at the end of the block.
        save: whether anything is kept for a backward.
        memory: "speed", "balanced" or "lean".
        backend: the user's choice, "auto" or a backend's name.
        level: the level of fusion, of `LEVELS`, or "auto" for what is fastest.
    """

    units: tuple[UnitSpec, ...]
    shortcut: str = "none"
    projection: UnitSpec | None = None
    pool: PoolSpec | None = None
    act: str = "relu"
    save: bool = False
    memory: str = "speed"
    backend: str = "auto"
    level: str = "auto"

    @property
    def all_units(self) -> tuple[UnitSpec, ...]:
        """Main path and projection, in the order of their tensors."""
        return self.units if self.projection is None else (*self.units, self.projection)

    @property
    def batch_stats(self) -> bool:
        """Whether anything is normalised by the statistics of its batch."""
        return any(unit.batch_stats for unit in self.all_units)

    @property
    def keeps_mask(self) -> bool:
        """A sum with a shortcut cannot be recomputed from one branch: its gate is kept as bits."""
        return self.save and self.act != "none" and self.shortcut != "none"

    @property
    def keeps_activated(self) -> bool:
        """Whether the activated tensors between units are kept, or recomputed in backward."""
        return self.save and self.memory == "speed"

    @property
    def recomputes_last(self) -> bool:
        """Whether the last raw convolution output is computed again in backward."""
        return self.save and self.memory == "lean" and len(self.units) > 1

    def encode(self) -> str:
        """The specification as one line, the inverse of `decode`.

        Raises:
            ValueError: for an unknown activation, with the known ones.
        """
        units = ";".join([_encode_unit(u) for u in self.units])
        projection = "-" if self.projection is None else _encode_unit(self.projection)
        pool = "-"
        if self.pool is not None:
            (kh, kw), (sh, sw), (ph, pw), ceil_mode, include = self.pool
            pool = f"{kh},{kw},{sh},{sw},{ph},{pw},{int(ceil_mode)},{int(include)}"
        return (
            f"{units}/{self.shortcut}/{projection}/{pool}/{_known(self.act)}/"
            f"{int(self.save)}/{self.memory}/{self.backend}/{self.level}"
        )


def _known(act: str) -> str:
    """`act`, where there is such an activation."""
    activation(act)
    return act


def _encode_unit(unit: UnitSpec) -> str:
    conv = "-"
    if unit.conv is not None:
        (sh, sw), (ph, pw), (dh, dw), groups = unit.conv
        conv = f"{sh},{sw},{ph},{pw},{dh},{dw},{groups}"
    return f"{conv}:{unit.eps!r}:{int(unit.batch_stats)}:{_known(unit.act)}"


def _decode_unit(text: str) -> UnitSpec:
    geometry, eps, batch_stats, act = text.split(":")
    conv = None
    if geometry != "-":
        sh, sw, ph, pw, dh, dw, groups = map(int, geometry.split(","))
        conv = ConvSpec((sh, sw), (ph, pw), (dh, dw), groups)
    return UnitSpec(conv, float(eps), batch_stats == "1", _known(act))


@lru_cache(maxsize=4096)
def decode(text: str) -> BlockSpec:
    """The specification that `BlockSpec.encode` wrote.

    Raises:
        ValueError: for an unknown activation, with the known ones.
    """
    units, shortcut, projection, pool, act, save, memory, backend, level = text.split("/")
    pool_spec = None
    if pool != "-":
        kh, kw, sh, sw, ph, pw, ceil_mode, include = map(int, pool.split(","))
        pool_spec = PoolSpec((kh, kw), (sh, sw), (ph, pw), bool(ceil_mode), bool(include))
    return BlockSpec(
        units=tuple(_decode_unit(u) for u in units.split(";")),
        shortcut=shortcut,
        projection=None if projection == "-" else _decode_unit(projection),
        pool=pool_spec,
        act=_known(act),
        save=save == "1",
        memory=memory,
        backend=backend,
        level=level,
    )
