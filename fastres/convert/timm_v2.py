"""The residual blocks of timm's ResNetV2: pre-activation, and those used for ViTs."""

from __future__ import annotations

from typing import Any

from timm.models import resnetv2
from torch import nn

# The norms of these networks have their activation within, which that file announces.
from fastres.convert import timm as _  # noqa: F401
from fastres.nn.blocks import FusedModule
from fastres.nn.match import Decline, Parts, Projection, Steps


def _parts_of(
    block: Any, units: tuple[Steps, ...], end: nn.Module | None, source: str
) -> Parts | Decline:
    """The parts of a block; a projection starts at `source`, an identity at the input."""
    units = (*units[:-1], units[-1]._replace(drop=block.drop_path))
    downsample = block.downsample
    if downsample is None:
        return Parts(units, end)
    m = downsample._modules
    if type(downsample) is resnetv2.DownsampleConv:
        projection = Projection(m["conv"], m["norm"])
        return Parts(units, end, source, projection, wrappers=(downsample,))
    if type(downsample) is not resnetv2.DownsampleAvg:
        return Decline(downsample, f"is a {type(downsample).__name__}, which is not fused")
    pool, wrappers = m["pool"], (downsample, m["pool"])
    if type(pool) not in (nn.Identity, nn.AvgPool2d):
        return Decline(pool, f"is a {type(pool).__name__}, not an AvgPool2d")
    projection = Projection(m["conv"], m["norm"], pool if type(pool) is nn.AvgPool2d else None)
    return Parts(units, end, source, projection, wrappers=wrappers)


class FusedPreActBasic(FusedModule, resnetv2.PreActBasic):  # type: ignore[misc]
    """timm's PreActBasic, fused."""

    def _parts(self) -> Parts | Decline:
        m = self._modules
        units = (
            Steps(None, m["norm1"]),
            Steps(m["conv1"], m["norm2"]),
            Steps(m["conv2"]),
        )
        return _parts_of(self, units, None, "activated")


class FusedPreActBottleneck(FusedModule, resnetv2.PreActBottleneck):  # type: ignore[misc]
    """timm's PreActBottleneck, fused."""

    def _parts(self) -> Parts | Decline:
        m = self._modules
        units = (
            Steps(None, m["norm1"]),
            Steps(m["conv1"], m["norm2"]),
            Steps(m["conv2"], m["norm3"]),
            Steps(m["conv3"]),
        )
        return _parts_of(self, units, None, "activated")


class FusedBottleneck(FusedModule, resnetv2.Bottleneck):  # type: ignore[misc]
    """timm's Bottleneck of resnetv2, fused."""

    def _parts(self) -> Parts | Decline:
        m = self._modules
        units = (
            Steps(m["conv1"], m["norm1"]),
            Steps(m["conv2"], m["norm2"]),
            Steps(m["conv3"], m["norm3"]),
        )
        return _parts_of(self, units, m["act3"], "input")


SWAPS: dict[type, type] = {
    resnetv2.PreActBasic: FusedPreActBasic,
    resnetv2.PreActBottleneck: FusedPreActBottleneck,
    resnetv2.Bottleneck: FusedBottleneck,
}
