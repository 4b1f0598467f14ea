"""ResNet, ResNeXt and Wide ResNet of fused blocks, with torchvision's parameters and names.

A `state_dict` of torchvision's network of the same name loads into these, and the other way
round; torchvision is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastres.nn.blocks import BasicBlock, Bottleneck
from fastres.nn.stem import FusedResNetStem
from fastres.nn.stock import NormLayer, conv1x1

__all__ = [
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

Block = type[BasicBlock] | type[Bottleneck]


class ResNet(FusedResNetStem):
    """A residual network for images, [N, 3, H, W] to [N, num_classes].

    Args:
        block: `fastres.BasicBlock` or `fastres.Bottleneck`, or a class with their constructor.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the last layer.
        zero_init_residual: start every block as its shortcut, with a zero in the last norm's
            weight (Goyal et al. 2017).
        groups: of the 3x3 convolutions of a Bottleneck.
        width_per_group: width of a Bottleneck's middle per 64 planes and group.
        replace_stride_with_dilation: three flags; a stage dilates instead of striding.
        norm_layer: makes the norms from a number of channels; nn.BatchNorm2d by default.

    Raises:
        ValueError: where replace_stride_with_dilation has not three elements, and what the block
            raises.

    He et al. 2015; mirrors torchvision.models.ResNet, its random initialisation included: the
    same seed gives the same weights.
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        dilate = [False, *_three(replace_stride_with_dilation)]
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes, self.dilation = 64, 1
        self.groups, self.base_width = groups, width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, planes in enumerate((64, 128, 256, 512)):
            stage = self._make_layer(block, planes, layers[i], 1 if i == 0 else 2, dilate[i])
            setattr(self, f"layer{i + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _make_layer(
        self, block: Block, planes: int, blocks: int, stride: int, dilate: bool
    ) -> nn.Sequential:
        previous = self.dilation
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        outplanes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes)
            )
        common = (self.groups, self.base_width)
        norm = self._norm_layer
        made = [block(self.inplanes, planes, stride, downsample, *common, previous, norm)]
        self.inplanes = outplanes
        for _ in range(1, blocks):
            made.append(block(outplanes, planes, 1, None, *common, self.dilation, norm))
        return nn.Sequential(*made)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        if not zero_init_residual:
            return
        for m in self.modules():
            if isinstance(m, BasicBlock | Bottleneck):
                last = m.bn3 if isinstance(m, Bottleneck) else m.bn2
                if isinstance(last.weight, nn.Parameter):
                    nn.init.constant_(last.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_classes]."""
        return self._forward_impl(x)


def _three(flags: Sequence[bool] | None) -> Sequence[bool]:
    if flags is None:
        return (False, False, False)
    if len(flags) != 3:
        raise ValueError(
            f"replace_stride_with_dilation should be None or a 3-element tuple, got {flags}"
        )
    return flags


def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18; keyword arguments as `ResNet`."""
    return ResNet(BasicBlock, [2, 2, 2, 2], **kwargs)


def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34; keyword arguments as `ResNet`."""
    return ResNet(BasicBlock, [3, 4, 6, 3], **kwargs)


def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50 v1.5; keyword arguments as `ResNet`."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **kwargs)


def resnet101(**kwargs: Any) -> ResNet:
    """ResNet-101 v1.5; keyword arguments as `ResNet`."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **kwargs)


def resnet152(**kwargs: Any) -> ResNet:
    """ResNet-152 v1.5; keyword arguments as `ResNet`."""
    return ResNet(Bottleneck, [3, 8, 36, 3], **kwargs)


def resnext50_32x4d(**kwargs: Any) -> ResNet:
    """ResNeXt-50, 32 groups of 4 (Xie et al. 2016); keyword arguments as `ResNet`."""
    return resnet50(**{"groups": 32, "width_per_group": 4, **kwargs})


def resnext101_32x8d(**kwargs: Any) -> ResNet:
    """ResNeXt-101, 32 groups of 8 (Xie et al. 2016); keyword arguments as `ResNet`."""
    return resnet101(**{"groups": 32, "width_per_group": 8, **kwargs})


def resnext101_64x4d(**kwargs: Any) -> ResNet:
    """ResNeXt-101, 64 groups of 4 (Xie et al. 2016); keyword arguments as `ResNet`."""
    return resnet101(**{"groups": 64, "width_per_group": 4, **kwargs})


def wide_resnet50_2(**kwargs: Any) -> ResNet:
    """Wide ResNet-50-2 (Zagoruyko and Komodakis 2016); keyword arguments as `ResNet`."""
    return resnet50(**{"width_per_group": 128, **kwargs})


def wide_resnet101_2(**kwargs: Any) -> ResNet:
    """Wide ResNet-101-2 (Zagoruyko and Komodakis 2016); keyword arguments as `ResNet`."""
    return resnet101(**{"width_per_group": 128, **kwargs})
