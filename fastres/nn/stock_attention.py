"""The textbook blocks with attention and stochastic depth: what the fused ones must equal."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastres.nn import stock
from fastres.nn.drop import drop_path_of
from fastres.nn.gate import SqueezeExcitation
from fastres.nn.stock import NormLayer

Attention = Callable[[int], nn.Module]


class SEBasicBlock(stock.BasicBlock):
    """A basic block whose residual branch goes through channel attention and stochastic depth.

    Args:
        inplanes: as in `BasicBlock`, and so are the next seven.
        planes: channels of the output.
        stride: of the first convolution.
        downsample: the shortcut's module, or None for the identity.
        groups: must be 1.
        base_width: must be 64.
        dilation: must be 1.
        norm_layer: makes the norms from a number of channels; nn.BatchNorm2d by default.
        attention: makes the attention from a number of channels: `SqueezeExcitation`,
            `EfficientChannelAttention`, or any module; nn.Identity leaves it out.
        drop_path: stochastic depth of the residual branch: a module, or a rate for `DropPath`.

    Input [N, inplanes, H, W], output [N, planes, H/stride, W/stride], of any floating dtype. Raises
    what `BasicBlock` raises.

    Hu et al. 2018, "Squeeze-and-Excitation Networks"; Wang et al. 2020, "ECA-Net".
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        attention: Attention = SqueezeExcitation,
        drop_path: nn.Module | float = 0.0,
    ) -> None:
        stock.BasicBlock.__init__(
            self, inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer
        )
        self.attention = attention(planes * self.expansion)
        self.drop_path = drop_path_of(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, planes, H/stride, W/stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.drop_path(self.attention(out))
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class SEBottleneck(stock.Bottleneck):
    """A bottleneck whose residual branch goes through channel attention and stochastic depth.

    Args:
        inplanes: as in `Bottleneck`, and so are the next seven.
        planes: the output has four times as many channels.
        stride: of the 3x3 convolution.
        downsample: the shortcut's module, or None for the identity.
        groups: of the 3x3 convolution.
        base_width: width of the middle per 64 planes and group.
        dilation: of the 3x3 convolution.
        norm_layer: makes the norms from a number of channels; nn.BatchNorm2d by default.
        attention: makes the attention from a number of channels: `SqueezeExcitation`,
            `EfficientChannelAttention`, or any module; nn.Identity leaves it out.
        drop_path: stochastic depth of the residual branch: a module, or a rate for `DropPath`.

    Input [N, inplanes, H, W], output [N, 4*planes, H/stride, W/stride], of any floating dtype.

    Hu et al. 2018, "Squeeze-and-Excitation Networks"; Wang et al. 2020, "ECA-Net".
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        attention: Attention = SqueezeExcitation,
        drop_path: nn.Module | float = 0.0,
    ) -> None:
        stock.Bottleneck.__init__(
            self, inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer
        )
        self.attention = attention(planes * self.expansion)
        self.drop_path = drop_path_of(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, 4*planes, H/stride, W/stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = self.drop_path(self.attention(out))
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result
