"""timm's residual blocks."""

from __future__ import annotations

from timm.models import resnet

from fastres.nn._children import Parts
from fastres.nn.blocks import FusedModule


class FusedBasicBlock(FusedModule, resnet.BasicBlock):  # type: ignore[misc]
    """timm's BasicBlock, fused."""

    def _parts(self) -> Parts:
        m = self._modules
        units = ((m["conv1"], m["bn1"], m["act1"]), (m["conv2"], m["bn2"], None))
        passive = (m["drop_block"], self.aa, self.se, self.drop_path)
        return Parts(units, m["act2"], self.downsample, passive)


class FusedBottleneck(FusedModule, resnet.Bottleneck):  # type: ignore[misc]
    """timm's Bottleneck, fused."""

    def _parts(self) -> Parts:
        m = self._modules
        units = (
            (m["conv1"], m["bn1"], m["act1"]),
            (m["conv2"], m["bn2"], m["act2"]),
            (m["conv3"], m["bn3"], None),
        )
        passive = (m["drop_block"], self.aa, self.se, self.drop_path)
        return Parts(units, m["act3"], self.downsample, passive)


SWAPS: dict[type, type] = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
}
