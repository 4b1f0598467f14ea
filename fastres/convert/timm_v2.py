"""The residual blocks of timm's ResNetV2: pre-activation, and those used for ViTs."""

from __future__ import annotations

from typing import Any

from timm.models import resnetv2
from torch import nn

# The norms of these networks have their activation within, which that file announces.
from fastres.convert import timm as _  # noqa: F401
from fastres.nn.blocks import FusedModule
from fastres.nn.match import Decline, Parts, Projection, Steps, children_of


def _with_shortcut(block: Any, units: list[Steps], end: Any, source: str) -> Parts | Decline:
    """The parts of a block; a projection starts at `source`, an identity at the input."""
    units[-1] = units[-1]._replace(drop=block.drop_path)
    downsample = block.downsample
    if downsample is None:
        return Parts(tuple(units), end)
    m = children_of(downsample)
    pool: Any = None
    wrappers: tuple[nn.Module, ...] = (downsample,)
    if type(downsample) is resnetv2.DownsampleAvg:
        pool, wrappers = m["pool"], (downsample, m["pool"])
        if type(pool) not in (nn.Identity, nn.AvgPool2d):
            return Decline(pool, f"is a {type(pool).__name__}, not an AvgPool2d")
        pool = pool if type(pool) is nn.AvgPool2d else None
    elif type(downsample) is not resnetv2.DownsampleConv:
        return Decline(downsample, f"is a {type(downsample).__name__}, which is not fused")
    projection = Projection(m["conv"], m["norm"], pool)
    return Parts(tuple(units), end, source, projection, wrappers=wrappers)


def _pre_activation(block: Any, count: int) -> Parts | Decline:
    m = children_of(block)
    inner = [Steps(m[f"conv{i}"], m[f"norm{i + 1}"]) for i in range(1, count)]
    units = [Steps(None, m["norm1"]), *inner, Steps(m[f"conv{count}"])]
    return _with_shortcut(block, units, None, "activated")


class FusedPreActBasic(FusedModule, resnetv2.PreActBasic):  # type: ignore[misc]
    """timm's PreActBasic, fused."""

    def _parts(self) -> Parts | Decline:
        return _pre_activation(self, 2)


class FusedPreActBottleneck(FusedModule, resnetv2.PreActBottleneck):  # type: ignore[misc]
    """timm's PreActBottleneck, fused."""

    def _parts(self) -> Parts | Decline:
        return _pre_activation(self, 3)


class FusedBottleneck(FusedModule, resnetv2.Bottleneck):  # type: ignore[misc]
    """timm's Bottleneck of resnetv2, fused."""

    def _parts(self) -> Parts | Decline:
        m = children_of(self)
        units = [Steps(m[f"conv{i}"], m[f"norm{i}"]) for i in (1, 2, 3)]
        return _with_shortcut(self, units, m["act3"], "input")


SWAPS: dict[type, type] = {
    resnetv2.PreActBasic: FusedPreActBasic,
    resnetv2.PreActBottleneck: FusedPreActBottleneck,
    resnetv2.Bottleneck: FusedBottleneck,
}
