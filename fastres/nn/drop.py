"""Dropout and stochastic depth as factors: drawn by the module itself, multiplied by a fused block.

The random numbers are those that the module would have drawn in the block's place, since it is the
module that draws them: from ones of the shape that its mask has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastres.kernels import dense

#: By class: whether a module multiplies by anything, and the shape of its mask for an activation
#: [N, C, H, W] that the module is given.
Shape = Sequence[int]
Works = Callable[[nn.Module], bool]
MaskShape = Callable[[nn.Module, Shape], Shape]
_KNOWN: dict[type | str, tuple[Works, MaskShape]] = {}


def register_drop(cls: type | str, works: Works, shape: MaskShape) -> None:
    """Announce a class of modules that multiply by random numbers.

    Args:
        cls: module(x) must be x times a mask that depends on the shape, dtype and layout of x
            alone. The class itself, or "module.Name" of one that need not be there.
        works: whether a module of the class draws anything, in the mode in which it is.
        shape: of a module's mask, for an activation of shape [N, C, H, W].
    """
    _KNOWN[cls] = works, shape


def _drops(module: nn.Module) -> bool:
    return module.training and bool(module.p)


register_drop(nn.Dropout, _drops, lambda module, shape: shape)
register_drop(nn.Dropout2d, _drops, lambda module, shape: (*shape[:2], 1, 1))


def per_image(module: nn.Module, shape: Shape) -> Shape:
    """The shape of stochastic depth's mask."""
    return (shape[0], 1, 1, 1)


def _known(module: nn.Module) -> tuple[Works, MaskShape] | None:
    cls = type(module)
    return _KNOWN.get(cls) or _KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")


def draws(module: nn.Module) -> bool:
    """Whether a module is known to multiply by random numbers and do nothing else."""
    return _known(module) is not None


def works(module: nn.Module) -> bool:
    """Whether a module that `draws` does so in the mode in which it is."""
    known = _known(module)
    return known is not None and known[0](module)


def draw(module: nn.Module, x: Tensor, shape: Shape, fmt: torch.memory_format) -> Tensor:
    """The factor by which a module multiplies an activation of [N, C, H, W] `shape`.

    It has the dtype and device of x, and the layout `fmt` that the activation would have.
    """
    known = _known(module)
    assert known is not None
    ones = x.new_ones(tuple(known[1](module, shape)))
    factor: Tensor = module(dense(ones, fmt))
    return factor


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


def _row(module: nn.Module, shape: Shape) -> Shape:
    return (shape[0] if module.mode == "row" else 1, 1, 1, 1)


register_drop(DropPath, _drops, per_image)
register_drop("torchvision.ops.stochastic_depth.StochasticDepth", _drops, _row)
register_drop(
    "timm.layers.drop.DropPath",
    lambda module: module.training and bool(module.drop_prob),
    per_image,
)
