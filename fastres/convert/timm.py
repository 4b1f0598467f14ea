"""timm's residual blocks and the stem of its ResNet."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import BatchNormAct2d, DropBlock2d
from timm.models import resnet
from torch import Tensor, nn

from fastres.nn.blocks import FusedModule
from fastres.nn.genuine import Sequential
from fastres.nn.match import Decline, Parts, Steps, children_of, hooked, register_norm_act
from fastres.nn.stem import FusedStem, with_pooling


class FusedBasicBlock(FusedModule, resnet.BasicBlock):  # type: ignore[misc]
    """timm's BasicBlock, fused."""

    def _parts(self) -> Parts | Decline:
        return _parts_of(self, 2)


class FusedBottleneck(FusedModule, resnet.Bottleneck):  # type: ignore[misc]
    """timm's Bottleneck, fused."""

    def _parts(self) -> Parts | Decline:
        return _parts_of(self, 3)


def _parts_of(block: Any, count: int) -> Parts | Decline:
    m = children_of(block)
    identities: list[nn.Module | None] = [m["aa"]]
    drop_block: Any = m["drop_block"]
    if type(drop_block) is not DropBlock2d:
        identities.append(drop_block)
    elif drop_block.training and drop_block.drop_prob:
        return Decline(drop_block, "is a DropBlock2d at work", permanent=False)
    elif (decline := hooked(drop_block)) is not None:
        return decline
    units = [Steps(m[f"conv{i}"], m[f"bn{i}"], m[f"act{i}"]) for i in range(1, count + 1)]
    end = units[-1].act
    units[-1] = units[-1]._replace(act=None, drop=block.drop_path)
    return Parts(
        tuple(units), end, projection=block.downsample, identities=tuple(identities), gate=block.se
    )


register_norm_act(BatchNormAct2d, lambda norm: (norm.drop, norm.act))


def _stem_of(network: nn.Module) -> Parts | Decline:
    m = children_of(network)
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


class FusedResNet(FusedStem, resnet.ResNet):  # type: ignore[misc]
    """timm's ResNet with a fused stem: one convolution, or three (ResNet-C and -D)."""

    _replaces: ClassVar[str] = "forward_features"

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def _parts(self) -> Parts | Decline:
        parts = _stem_of(self)
        return parts if isinstance(parts, Decline) else with_pooling(parts, self)

    def forward_features(self, x: Tensor) -> Tensor:
        """As timm's, all but the stem."""
        out = self.fused_stem(x)
        if out is None:
            features: Tensor = super().forward_features(x)
            return features
        x = out
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
