"""The textbook pre-activation blocks: what the fused ones must equal."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fastres.nn.drop import drop_path_of
from fastres.nn.stock import NormLayer, conv1x1, conv3x3

#: Where the shortcut of a pre-activation block may start.
SHORTCUTS = ("input", "activated")


def _checked(shortcut: str) -> str:
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
    return shortcut


class PreActBasicBlock(nn.Module):
    """Two 3x3 convolutions, each behind its batch norm and ReLU, and a shortcut.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of the first convolution.
        downsample: the shortcut's module, or None for the identity.
        groups: must be 1.
        base_width: must be 64.
        dilation: of both convolutions.
        norm_layer: makes the norms from a number of channels; nn.BatchNorm2d by default.
        shortcut: where the shortcut starts: "input", or "activated" for the first ReLU's output,
            as the paper has it where there is a projection.
        drop_path: stochastic depth of the residual branch: a module, or a rate for `DropPath`.

    Input [N, inplanes, H, W], output [N, planes, H/stride, W/stride], of any floating dtype.

    Raises:
        ValueError: for groups other than 1, base_width other than 64, or an unknown shortcut.

    He et al. 2016, "Identity Mappings in Deep Residual Networks".
    """

    expansion: ClassVar[int] = 1

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
        shortcut: str = "input",
        drop_path: nn.Module | float = 0.0,
    ) -> None:
        nn.Module.__init__(self)
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError("PreActBasicBlock only supports groups=1 and base_width=64")
        self.bn1 = norm_layer(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(inplanes, planes, stride, dilation=dilation)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes, dilation=dilation)
        self.drop_path = drop_path_of(drop_path)
        self.downsample = downsample
        self.stride = stride
        self.shortcut = _checked(shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, planes, H/stride, W/stride]."""
        out = self.relu(self.bn1(x))
        source = x if self.shortcut == "input" else out
        out = self.relu(self.bn2(self.conv1(out)))
        out = self.drop_path(self.conv2(out))
        result: Tensor = out + (source if self.downsample is None else self.downsample(source))
        return result


class PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each behind its batch norm and ReLU, and a shortcut.

    Args:
        inplanes: channels of the input.
        planes: the output has four times as many channels.
        stride: of the 3x3 convolution.
        downsample: the shortcut's module, or None for the identity.
        groups: of the 3x3 convolution.
        base_width: width of the middle per 64 planes and group.
        dilation: of the 3x3 convolution.
        norm_layer: makes the norms from a number of channels; nn.BatchNorm2d by default.
        shortcut: where the shortcut starts: "input", or "activated" for the first ReLU's output,
            as the paper has it where there is a projection.
        drop_path: stochastic depth of the residual branch: a module, or a rate for `DropPath`.

    Input [N, inplanes, H, W], output [N, 4*planes, H/stride, W/stride], of any floating dtype.

    Raises:
        ValueError: for an unknown shortcut.

    He et al. 2016, "Identity Mappings in Deep Residual Networks".
    """

    expansion: ClassVar[int] = 4

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
        shortcut: str = "input",
        drop_path: nn.Module | float = 0.0,
    ) -> None:
        nn.Module.__init__(self)
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, width)
        self.bn2 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn3 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.drop_path = drop_path_of(drop_path)
        self.downsample = downsample
        self.stride = stride
        self.shortcut = _checked(shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, 4*planes, H/stride, W/stride]."""
        out = self.relu(self.bn1(x))
        source = x if self.shortcut == "input" else out
        out = self.relu(self.bn2(self.conv1(out)))
        out = self.relu(self.bn3(self.conv2(out)))
        out = self.drop_path(self.conv3(out))
        result: Tensor = out + (source if self.downsample is None else self.downsample(source))
        return result


class WideBasicBlock(nn.Module):
    """A pre-activation block of two 3x3 convolutions with dropout between them.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of the first convolution.
        dropout: a module between the second ReLU and its convolution, or a rate for nn.Dropout.
        norm_layer: makes the norms from a number of channels; nn.BatchNorm2d by default.
        drop_path: stochastic depth of the residual branch: a module, or a rate for `DropPath`.

    Where the shape changes, the shortcut is a 1x1 convolution of the first ReLU's output; else it
    is the input. Input [N, inplanes, H, W], output [N, planes, H/stride, W/stride], of any floating
    dtype. Raises what nn.Conv2d and nn.Dropout raise.

    Zagoruyko & Komodakis 2016, "Wide Residual Networks".
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        dropout: nn.Module | float = 0.0,
        norm_layer: NormLayer | None = None,
        *,
        drop_path: nn.Module | float = 0.0,
    ) -> None:
        nn.Module.__init__(self)
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.dropout = dropout if isinstance(dropout, nn.Module) else nn.Dropout(dropout)
        self.conv2 = conv3x3(planes, planes)
        self.drop_path = drop_path_of(drop_path)
        keeps = stride == 1 and inplanes == planes
        self.downsample = None if keeps else conv1x1(inplanes, planes, stride)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, planes, H/stride, W/stride]."""
        first = self.relu(self.bn1(x))
        out = self.dropout(self.relu(self.bn2(self.conv1(first))))
        out = self.drop_path(self.conv2(out))
        result: Tensor = out + (x if self.downsample is None else self.downsample(first))
        return result
