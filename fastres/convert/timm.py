"""timm's residual blocks."""

from __future__ import annotations

from typing import Any

from timm.layers import DropBlock2d, DropPath
from timm.models import resnet
from torch import nn

from fastres.nn._children import Decline, Parts, Unit, hooked
from fastres.nn.blocks import FusedModule


class FusedBasicBlock(FusedModule, resnet.BasicBlock):  # type: ignore[misc]
    """timm's BasicBlock, fused."""

    def _parts(self) -> Parts | Decline:
        m = self._modules
        units = ((m["conv1"], m["bn1"], m["act1"]), (m["conv2"], m["bn2"], None))
        return _parts_of(self, units, m["act2"])


class FusedBottleneck(FusedModule, resnet.Bottleneck):  # type: ignore[misc]
    """timm's Bottleneck, fused."""

    def _parts(self) -> Parts | Decline:
        m = self._modules
        units = (
            (m["conv1"], m["bn1"], m["act1"]),
            (m["conv2"], m["bn2"], m["act2"]),
            (m["conv3"], m["bn3"], None),
        )
        return _parts_of(self, units, m["act3"])


def _parts_of(block: Any, units: tuple[Unit, ...], end: nn.Module | None) -> Parts | Decline:
    passive: list[nn.Module | None] = [block.aa, block.se]
    for drop in (block.drop_block, block.drop_path):
        if type(drop) not in (DropBlock2d, DropPath):
            passive.append(drop)
        elif drop.training and drop.drop_prob:
            return Decline(drop, f"is a {type(drop).__name__} at work", lasting=False)
        elif (decline := hooked(drop)) is not None:
            return decline
    return Parts(units, end, block.downsample, tuple(passive))


SWAPS: dict[type, type] = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
}
