"""torchvision's residual blocks and the stem of its ResNet."""

from __future__ import annotations

from torchvision.models import resnet

from fastres.nn.blocks import FusedModule, post_activation
from fastres.nn.match import Parts
from fastres.nn.stem import FusedResNetStem


class FusedBasicBlock(FusedModule, resnet.BasicBlock):  # type: ignore[misc]
    """torchvision's BasicBlock, fused."""

    def _parts(self) -> Parts:
        return post_activation(self, 2)


class FusedBottleneck(FusedModule, resnet.Bottleneck):  # type: ignore[misc]
    """torchvision's Bottleneck, fused."""

    def _parts(self) -> Parts:
        return post_activation(self, 3)


class FusedResNet(FusedResNetStem, resnet.ResNet):  # type: ignore[misc]
    """torchvision's ResNet with a fused stem."""


SWAPS: dict[type, type] = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
    resnet.ResNet: FusedResNet,
}
