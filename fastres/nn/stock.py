"""The textbook residual blocks, out of torch's own modules: what the fused ones must equal.

Constructors, attribute names, parameters and errors are those of torchvision's blocks. A base class
holds the constructor and the forward of its kind; a block builds its children and runs its branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from fastres.nn.factors import SqueezeExcitation, drop_path_of

NormLayer = Callable[..., nn.Module]
Attention = Callable[[int], nn.Module]

#: Where the shortcut of a pre-activation block may start.
SHORTCUTS = ("input", "activated")


def conv3x3(
    inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(
        inplanes, planes, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


def bottleneck_width(planes: int, groups: int, base_width: int) -> int:
    """Channels in the middle of a bottleneck."""
    return int(planes * (base_width / 64.0)) * groups


def _require_plain(name: str, groups: int, base_width: int) -> None:
    if groups != 1 or base_width != 64:
        raise ValueError(f"{name} only supports groups=1 and base_width=64")


class _Block(nn.Module):
    """relu(branch(x) + shortcut(x)).

    nn.Module.__init__ is called by name: torchvision's class may come next among a block's bases.
    """

    expansion: ClassVar[int] = 1
    if TYPE_CHECKING:  # TorchScript knows no such annotation.
        relu: nn.Module
        bn1: nn.Module

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
    ) -> None:
        nn.Module.__init__(self)
        norm_layer = norm_layer or nn.BatchNorm2d
        self._build(inplanes, planes, stride, groups, base_width, dilation, norm_layer)
        self.downsample = downsample
        self.stride = stride

    def _build(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int,
        norm_layer: NormLayer,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def _branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, expansion*planes, H/stride, W/stride]."""
        out = self._branch(x)
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class BasicBlock(_Block):
    """Two 3x3 convolutions and a shortcut, each convolution batch-normalised.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of the first convolution.
        downsample: the shortcut's module, or None for the identity.
        groups: must be 1.
        base_width: must be 64.
        dilation: must be 1.
        norm_layer: makes the norms from a number of channels; nn.BatchNorm2d by default.

    Raises:
        ValueError: for groups other than 1 or base_width other than 64.
        NotImplementedError: for a dilation above 1.

    He et al. 2015; mirrors torchvision.models.resnet.BasicBlock.
    """

    def _build(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int,
        norm_layer: NormLayer,
    ) -> None:  # fmt: skip
        _require_plain("BasicBlock", groups, base_width)
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)

    def _branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return out


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolution and a shortcut; the stride is on the 3x3 ("v1.5").

    Args:
        inplanes: channels of the input.
        planes: the output has four times as many channels.
        stride: of the 3x3 convolution.
        downsample: the shortcut's module, or None for the identity.
        groups: of the 3x3 convolution.
        base_width: width of the middle per 64 planes and group.
        dilation: of the 3x3 convolution.
        norm_layer: makes the norms from a number of channels; nn.BatchNorm2d by default.

    He et al. 2015; mirrors torchvision.models.resnet.Bottleneck.
    """

    expansion: ClassVar[int] = 4

    def _build(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int,
        norm_layer: NormLayer,
    ) -> None:  # fmt: skip
        width = bottleneck_width(planes, groups, base_width)
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)

    def _branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out


class _AttentionBlock(_Block):
    """relu(drop_path(attention(branch(x))) + shortcut(x))."""

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
        _Block.__init__(
            self, inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer
        )
        self.attention = attention(planes * self.expansion)
        self.drop_path = drop_path_of(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, expansion*planes, H/stride, W/stride]."""
        out = self.drop_path(self.attention(self._branch(x)))
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class SEBasicBlock(_AttentionBlock, BasicBlock):
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


class SEBottleneck(_AttentionBlock, Bottleneck):
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


class _PreActBlock(_Block):
    """drop_path(branch(relu(bn1(x)))) + shortcut, which starts at x or behind that first ReLU."""

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
        self._build(inplanes, planes, stride, groups, base_width, dilation, norm_layer)
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
        self.drop_path = drop_path_of(drop_path)
        self.downsample = downsample
        self.stride = stride
        self.shortcut = shortcut

    def _source(self, x: Tensor, activated: Tensor) -> Tensor:
        """Where the shortcut starts."""
        return x if self.shortcut == "input" else activated

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, expansion*planes, H/stride, W/stride]."""
        activated = self.relu(self.bn1(x))
        source = self._source(x, activated)
        out = self.drop_path(self._branch(activated))
        result: Tensor = out + (source if self.downsample is None else self.downsample(source))
        return result


class PreActBasicBlock(_PreActBlock):
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

    def _build(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int,
        norm_layer: NormLayer,
    ) -> None:  # fmt: skip
        _require_plain("PreActBasicBlock", groups, base_width)
        self.bn1 = norm_layer(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(inplanes, planes, stride, dilation=dilation)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes, dilation=dilation)

    def _branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn2(self.conv1(x)))
        out = self.conv2(out)
        return out


class PreActBottleneck(_PreActBlock):
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

    def _build(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int,
        norm_layer: NormLayer,
    ) -> None:  # fmt: skip
        width = bottleneck_width(planes, groups, base_width)
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, width)
        self.bn2 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn3 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)

    def _branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn2(self.conv1(x)))
        out = self.relu(self.bn3(self.conv2(out)))
        out = self.conv3(out)
        return out


class WideBasicBlock(_PreActBlock):
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

    def _source(self, x: Tensor, activated: Tensor) -> Tensor:
        return x if self.downsample is None else activated

    def _branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.relu(self.bn2(self.conv1(x))))
        out = self.conv2(out)
        return out
