"""Modules that multiply an activation by a factor: dropout, stochastic depth, squeeze and excite.

Dropout and stochastic depth draw their factor themselves, from ones of the shape that their mask
has, so the random numbers are those that they would have drawn in the block's place.

A gate computes its factor from the mean over each image. A fused block takes that mean from its
last convolution's raw output, and applies the factor in its last pass; what lies between, the
gate's small layers, are called as modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastres.kernels import dense

T = TypeVar("T")
Shape = Sequence[int]


class Drop(NamedTuple):
    """What is known of a class that multiplies by random numbers; see `register_drop`."""

    works: Callable[[nn.Module], bool]
    shape: Callable[[nn.Module, Shape], Shape]


class Gate(NamedTuple):
    """What is known of a class that multiplies by a factor of the mean; see `register_gate`."""

    excite: Callable[[Any, Tensor], Tensor]
    why_not: Callable[[Any], str | None]


_DROPS: dict[type | str, Drop] = {}
_GATES: dict[type | str, Gate] = {}


def _of_class(table: Mapping[type | str, T], module: nn.Module) -> T | None:
    cls = type(module)
    return table.get(cls) or table.get(f"{cls.__module__}.{cls.__qualname__}")


def register_drop(
    cls: type | str,
    works: Callable[[nn.Module], bool],
    shape: Callable[[nn.Module, Shape], Shape],
) -> None:
    """Announce a class of modules that multiply by random numbers.

    Args:
        cls: module(x) must be x times a mask that depends on the shape, dtype and layout of x
            alone. The class itself, or "module.Name" of one that need not be there.
        works: whether a module of the class draws anything, in the mode in which it is.
        shape: of a module's mask, for an activation of shape [N, C, H, W].
    """
    _DROPS[cls] = Drop(works, shape)


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
    _GATES[cls] = Gate(excite, why_not)


def drop_of(module: nn.Module) -> Drop | None:
    """What is known of a module that multiplies by random numbers and does nothing else."""
    return _of_class(_DROPS, module)


def gate_of(module: nn.Module) -> Gate | None:
    """What is known of a module that multiplies by a factor of the mean and does nothing else."""
    return _of_class(_GATES, module)


def draw(module: nn.Module, x: Tensor, shape: Shape, fmt: torch.memory_format) -> Tensor:
    """The factor by which a module multiplies an activation of [N, C, H, W] `shape`.

    It has the dtype and device of x, and the layout `fmt` that the activation would have.
    """
    drop = drop_of(module)
    assert drop is not None
    ones = x.new_ones(tuple(drop.shape(module, shape)))
    factor: Tensor = module(dense(ones, fmt))
    return factor


def excite(module: nn.Module, mean: Tensor) -> Tensor:
    """The factor that a gate gives for the mean [N, C, 1, 1]."""
    gate = gate_of(module)
    assert gate is not None
    return gate.excite(module, mean)


class Factor(nn.Module):
    """Stands for a multiplication by a factor that somebody else computed."""


class DropPath(nn.Module):
    """Stochastic depth: zeroes whole images of a residual branch at random, in training.

    Args:
        p: probability that an image is zeroed; the others are divided by 1 - p.

    Input and output are [N, ...] of any floating dtype.

    Raises:
        ValueError: for p outside of [0, 1].

    Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be between 0 and 1, got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x times 0 or 1/(1 - p) per image; x itself in evaluation."""
        if not self.training or not self.p:
            return x
        kept = 1.0 - self.p
        mask = x.new_empty((x.shape[0], *[1 for _ in x.shape[1:]])).bernoulli_(kept)
        return x * (mask.div_(kept) if kept > 0.0 else mask)

    def extra_repr(self) -> str:
        """The rate."""
        return f"p={self.p}"


def drop_path_of(drop_path: nn.Module | float) -> nn.Module:
    """A module for a rate: `DropPath`, or nn.Identity for the rate 0."""
    if isinstance(drop_path, nn.Module):
        return drop_path
    return DropPath(drop_path) if drop_path else nn.Identity()


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


def _drops(module: nn.Module) -> bool:
    return module.training and bool(module.p)


def _per_image(module: nn.Module, shape: Shape) -> Shape:
    return (shape[0], 1, 1, 1)


def _per_image_or_batch(module: nn.Module, shape: Shape) -> Shape:
    return (shape[0] if module.mode == "row" else 1, 1, 1, 1)


def _drops_in_timm(module: nn.Module) -> bool:
    return module.training and bool(module.drop_prob)


register_drop(Factor, lambda module: True, lambda module, shape: shape)
register_drop(nn.Dropout, _drops, lambda module, shape: shape)
register_drop(nn.Dropout2d, _drops, lambda module, shape: (*shape[:2], 1, 1))
register_drop(DropPath, _drops, _per_image)
register_drop("torchvision.ops.stochastic_depth.StochasticDepth", _drops, _per_image_or_batch)
register_drop("timm.layers.drop.DropPath", _drops_in_timm, _per_image)
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
