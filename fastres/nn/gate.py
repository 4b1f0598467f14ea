"""Squeeze and excite: modules that multiply an activation by a factor of its own mean.

A fused block takes the mean over each image from its last convolution's raw output, and applies the
factor in its last pass; what lies between, the gate's small layers, are called as modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class _Gate(NamedTuple):
    excite: Callable[[Any, Tensor], Tensor]
    why_not: Callable[[Any], str | None]


_KNOWN: dict[type | str, _Gate] = {}


def register_gate(
    cls: type | str,
    excite: Callable[[Any, Tensor], Tensor],
    why_not: Callable[[Any], str | None] = lambda module: None,
) -> None:
    """Announce a class of modules that multiply by a factor of the mean over each image.

    Args:
        cls: module(x) must be x * excite(module, x.mean((2, 3), keepdim=True)). The class itself,
            or "module.Name" of one that need not be there.
        excite: the factor, [N, C, 1, 1] or what broadcasts to the activation, from the mean
            [N, C, 1, 1]. It calls the module's children as modules, hooks and all.
        why_not: what keeps a module of the class from being that, or None.
    """
    _KNOWN[cls] = _Gate(excite, why_not)


def _known(module: nn.Module) -> _Gate | None:
    cls = type(module)
    return _KNOWN.get(cls) or _KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")


def is_gate(module: nn.Module) -> bool:
    """Whether a module is known to multiply by a factor of the mean."""
    return _known(module) is not None


def why_not_gate(module: nn.Module) -> str | None:
    """What a gate computes besides, or None."""
    known = _known(module)
    assert known is not None
    return known.why_not(module)


def excite(module: nn.Module, mean: Tensor) -> Tensor:
    """The factor that a gate gives for the mean [N, C, 1, 1]."""
    known = _known(module)
    assert known is not None
    return known.excite(module, mean)


class SqueezeExcitation(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean of x over each image)))).

    Args:
        channels: of input and output.
        reduced: channels between the two layers; by default a sixteenth, but at least one.

    Input and output are [N, channels, H, W]; children `fc1`, `relu`, `fc2`, `gate`, of which the
    first and third are 1x1 convolutions with a bias. Raises what nn.Conv2d raises.

    Hu et al. 2018, "Squeeze-and-Excitation Networks".
    """

    def __init__(self, channels: int, reduced: int | None = None) -> None:
        super().__init__()
        reduced = max(1, channels // 16) if reduced is None else reduced
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Sigmoid()

    def excite(self, mean: Tensor) -> Tensor:
        """The factor [N, channels, 1, 1] from the mean of that shape."""
        factor: Tensor = self.gate(self.fc2(self.relu(self.fc1(mean))))
        return factor

    def forward(self, x: Tensor) -> Tensor:
        """x times its factor."""
        return x * self.excite(x.mean((2, 3), keepdim=True))


class EfficientChannelAttention(nn.Module):
    """x * sigmoid(conv(mean of x over each image)), a convolution along the channels.

    Args:
        channels: of input and output.
        kernel_size: of the convolution, odd; by default the paper's, from the number of channels.

    Input and output are [N, channels, H, W]; children `conv`, an nn.Conv1d without bias, and
    `gate`.

    Raises:
        ValueError: for an even kernel size.

    Wang et al. 2020, "ECA-Net: Efficient Channel Attention for Deep CNNs".
    """

    def __init__(self, channels: int, kernel_size: int | None = None) -> None:
        super().__init__()
        if kernel_size is None:
            size = int((math.log2(channels) + 1) / 2)
            kernel_size = max(size if size % 2 else size + 1, 3)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.gate = nn.Sigmoid()

    def excite(self, mean: Tensor) -> Tensor:
        """The factor [N, channels, 1, 1] from the mean of that shape."""
        factor: Tensor = self.gate(self.conv(mean.flatten(1).unsqueeze(1)))
        return factor.squeeze(1)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """x times its factor."""
        return x * self.excite(x.mean((2, 3), keepdim=True))


register_gate(SqueezeExcitation, SqueezeExcitation.excite)
register_gate(EfficientChannelAttention, EfficientChannelAttention.excite)


def _squeeze_of_torchvision(module: Any, mean: Tensor) -> Tensor:
    return module.scale_activation(module.fc2(module.activation(module.fc1(mean))))


def _pools_by_itself(module: Any) -> str | None:
    pool = module.avgpool
    plain = type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))
    watched = pool._forward_hooks or pool._forward_pre_hooks or pool._backward_hooks
    watched = watched or pool._backward_pre_hooks or "forward" in pool.__dict__
    return None if plain and not watched else "does more than pool in its avgpool"


register_gate("torchvision.ops.misc.SqueezeExcitation", _squeeze_of_torchvision, _pools_by_itself)


def _se_of_timm(module: Any, mean: Tensor) -> Tensor:
    return module.gate(module.fc2(module.act(module.bn(module.fc1(mean)))))


register_gate(
    "timm.layers.squeeze_excite.SEModule",
    _se_of_timm,
    lambda module: "pools the maximum too" if module.add_maxpool else None,
)


def _eca_of_timm(module: Any, mean: Tensor) -> Tensor:
    y = module.conv(mean.view(mean.shape[0], 1, -1))
    if module.conv2 is not None:
        y = module.conv2(module.act(y))
    return module.gate(y).view(mean.shape[0], -1, 1, 1)


register_gate("timm.layers.eca.EcaModule", _eca_of_timm)
