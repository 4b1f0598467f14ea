"""timm's residual blocks and the stem of its ResNet."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import BatchNormAct2d, DropBlock2d
from timm.models import resnet
from torch import Tensor, nn

from fastres.nn.blocks import FusedModule
from fastres.nn.genuine import Sequential
from fastres.nn.match import Decline, Parts, Steps, hooked, register_norm_act
from fastres.nn.stem import FusedStem


class FusedBasicBlock(FusedModule, resnet.BasicBlock):  # type: ignore[misc]
    """timm's BasicBlock, fused."""

    def _parts(self) -> Parts | Decline:
        m = self._modules
        units = (Steps(m["conv1"], m["bn1"], m["act1"]), Steps(m["conv2"], m["bn2"]))
        return _parts_of(self, units, m["act2"])


class FusedBottleneck(FusedModule, resnet.Bottleneck):  # type: ignore[misc]
    """timm's Bottleneck, fused."""

    def _parts(self) -> Parts | Decline:
        m = self._modules
        units = (
            Steps(m["conv1"], m["bn1"], m["act1"]),
            Steps(m["conv2"], m["bn2"], m["act2"]),
            Steps(m["conv3"], m["bn3"]),
        )
        return _parts_of(self, units, m["act3"])


def _parts_of(block: Any, units: tuple[Steps, ...], end: nn.Module | None) -> Parts | Decline:
    identities: list[nn.Module | None] = [block.aa]
    drop = block.drop_block
    if type(drop) is not DropBlock2d:
        identities.append(drop)
    elif drop.training and drop.drop_prob:
        return Decline(drop, "is a DropBlock2d at work", permanent=False)
    elif (decline := hooked(drop)) is not None:
        return decline
    units = (*units[:-1], units[-1]._replace(drop=block.drop_path))
    return Parts(
        units, end, projection=block.downsample, identities=tuple(identities), gate=block.se
    )


register_norm_act(BatchNormAct2d, lambda norm: (norm.drop, norm.act))


class FusedResNet(FusedStem, resnet.ResNet):  # type: ignore[misc]
    """timm's ResNet with a fused stem: one convolution, or three (ResNet-C and -D)."""

    _replaces: ClassVar[str] = "forward_features"

    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def _parts(self) -> Parts | Decline:
        m = self._modules
        conv, end = m["conv1"], m["act1"]
        if type(conv) is not Sequential:
            return Parts((Steps(conv, m["bn1"]),), end, "none")
        chain = list(conv._modules.values())
        if len(chain) % 3 != 1:
            return Decline(conv, "is not a chain of convolutions, batch norms and activations")
        links = [*chain, m["bn1"], end]
        groups = zip(links[::3], links[1::3], links[2::3], strict=True)
        *units, last = [Steps(*group) for group in groups]
        return Parts((*units, last._replace(act=None)), end, "none", wrappers=(conv,))

    def forward_features(self, x: Tensor) -> Tensor:
        """As timm's, all but the stem."""
        out = self.fused_stem(x)
        if out is None:
            found: Tensor = super().forward_features(x)
            return found
        x = self.maxpool(out)
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        if self.grad_checkpointing:
            return resnet.checkpoint_seq(stages, x, flatten=True)  # type: ignore[no-any-return]
        for stage in stages:
            x = stage(x)
        return x


SWAPS: dict[type, type] = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
    resnet.ResNet: FusedResNet,
}
