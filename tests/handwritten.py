"""Residual blocks and chains as people write them, none of which any library has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastres


def conv3(inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class Textbook(nn.Module):
    """The basic block of most tutorials: functional ReLUs, an empty Sequential for the identity."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, outputs, stride, bias), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3(outputs, outputs, bias=bias), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=bias), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Cifar(nn.Module):
    """Layers in a Sequential, ReLUs in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.left = nn.Sequential(
            conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            conv3(outputs, outputs), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.left(x) + self.shortcut(x), inplace=True)


class Activated(nn.Module):
    """A basic block of any activation, given as a module or a function."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, act: Any = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, stride)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(out)) + self.down(x))


class ThreeConvolutions(nn.Module):
    """A bottleneck with every spelling of ReLU and addition, and one ReLU module for two places."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = 2 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.down = None
        if stride != 1 or inputs != outputs:
            self.down = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.down is None else self.down(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)).relu()
        out = self.bn3(self.conv3(out))
        return self.relu(torch.add(identity, out))


class ThreeBranches(nn.Module):
    """RepVGG's: two convolutions and a norm of the input, added up in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large = nn.Sequential(conv3(channels, channels), nn.BatchNorm2d(channels))
        self.small = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.norm(x)
        out = self.large(x) + self.small(x)
        out += identity
        return F.relu(out)


class WritesIntoWhatIsRead(ThreeBranches):
    """As `ThreeBranches`, but the first sum is read again, as it is after the second."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.large(x) + self.small(x)
        total = out * 2
        total += self.norm(x)
        out += self.norm(total)
        return out * total


class PreActivation(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class Wide(nn.Module):
    """Wide ResNet's block, its dropout a function of the mode."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, rate: float = 0.3) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        self.rate = rate
        self.same = inputs == outputs and stride == 1
        self.shortcut = None if self.same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(x))
        if not self.same:
            x = self.shortcut(out)
        out = torch.relu(self.bn2(self.conv1(out)))
        if self.rate > 0:
            out = F.dropout(out, p=self.rate, training=self.training)
        return torch.add(x, self.conv2(out))


class Squeeze(nn.Module):
    """Squeeze and excite by hand, which no registration announces."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 2), nn.Linear(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(n, c)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(y)))).view(n, c, 1, 1)


class WithSqueeze(Textbook):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, known: bool = False) -> None:
        super().__init__(inputs, outputs, stride)
        self.se = fastres.nn.SqueezeExcitation(outputs) if known else Squeeze(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        return F.relu(out + self.shortcut(x))


class Attention(Textbook):
    """A block whose residual branch is multiplied by what `attend` makes of it."""

    attend: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.attend(out) + self.shortcut(x))


class DoubleConv(nn.Module):
    """U-Net's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            conv3(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            conv3(outputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


def vgg(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        conv3(inputs, outputs, bias=True), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        conv3(outputs, outputs, bias=True), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        conv3(outputs, outputs, bias=True), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
    )  # fmt: skip


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OptionA(Textbook):
    """CIFAR's shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 2)
        more = (outputs - inputs) // 2
        self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more)))


class Dense(nn.Module):
    """A layer of a DenseNet: its input goes on beside its output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), conv3(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x)))
        out = self.conv2(F.relu(self.norm2(out)))
        return torch.cat([x, out], 1)


class IntoTheInput(Textbook):
    """Adds into its own input, and is seen to do so."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        x += self.bn2(self.conv2(out))
        return F.relu(x)


class Modes(Textbook):
    """Does something else in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.training:
            return F.relu(out + self.shortcut(x))
        return out - self.shortcut(x)


class Values(Textbook):
    """Its control flow depends on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if x.sum() > 0 else x)


# ---------------------------------------------------------------- layouts of large code bases


class FrozenNorm(nn.Module):
    """A frozen batch norm by detectron2's names: all four are buffers, `eps` an attribute."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels) - eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            scale = scale.reshape(1, -1, 1, 1)
            bias = bias.reshape(1, -1, 1, 1)
            return x * scale.to(x.dtype) + bias.to(x.dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps
        )


class ConvNorm(nn.Conv2d):
    """detectron2's convolution, which calls a norm and an activation of its own."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm = norm
        self.activation = None

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class ByDetectron(nn.Module):
    """A bottleneck in detectron2's layout: `conv1.norm`, `shortcut.norm`, functional ReLUs."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, norm: Any = None) -> None:
        super().__init__()
        norm = norm or nn.BatchNorm2d
        width = outputs // 2
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = ConvNorm(inputs, outputs, 1, stride, bias=False, norm=norm(outputs))
        self.conv1 = ConvNorm(inputs, width, 1, stride, bias=False, norm=norm(width))
        self.conv2 = ConvNorm(width, width, 3, padding=1, bias=False, norm=norm(width))
        self.conv3 = ConvNorm(width, outputs, 1, bias=False, norm=norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        shortcut = self.shortcut(x) if self.shortcut is not None else x
        out += shortcut
        return F.relu_(out)


class ByDetection(nn.Module):
    """A basic block in mmdetection's layout: norms by properties, a forward within the forward."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, with_cp: bool = False) -> None:
        super().__init__()
        self.norm1_name, self.norm2_name = "bn1", "bn2"
        self.conv1 = conv3(inputs, outputs, stride)
        self.add_module(self.norm1_name, nn.BatchNorm2d(outputs))
        self.conv2 = conv3(outputs, outputs)
        self.add_module(self.norm2_name, nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.with_cp = with_cp

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        def _inner_forward(x: Tensor) -> Tensor:
            identity = x
            out = self.norm1(self.conv1(x))
            out = self.relu(out)
            out = self.norm2(self.conv2(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            out = checkpoint(_inner_forward, x, use_reentrant=False)
        else:
            out = _inner_forward(x)
        return self.relu(out)


# ---------------------------------------------------------------- networks of them

_NETWORKS: dict[str, Any] = {
    "textbook": Textbook,
    "textbook-bias": lambda *sizes: Textbook(*sizes, bias=True),
    "cifar": Cifar,
    "bottleneck": lambda inputs, outputs, stride=1: ThreeConvolutions(inputs, outputs // 2, stride),
    "pre-activation": PreActivation,
    "wide": Wide,
    "squeeze-excite": WithSqueeze,
    "double-conv": lambda inputs, outputs, _=1: DoubleConv(inputs, outputs),
    "option-a": lambda i, o, s=1: Textbook(i, o, s) if i == o else OptionA(i, o),
    "vgg": lambda inputs, outputs, _=1: vgg(inputs, outputs),
    "dense": lambda inputs, outputs, _=1: Dense(inputs, outputs - inputs or 8),
    "detectron2": ByDetectron,
    "detectron2-frozen": lambda *sizes: ByDetectron(*sizes, norm=FrozenNorm),
    "mmdetection": ByDetection,
}


def network(kind: str) -> nn.Module:
    """A stem, and two blocks of a kind, of which the second is narrower in pixels."""
    make = _NETWORKS[kind]
    blocks = [make(8, 8), make(16 if kind == "dense" else 8, 24 if kind == "dense" else 16, 2)]
    return nn.Sequential(conv3(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), *blocks)
