"""Dropout and stochastic depth as factors: drawn by the module itself, multiplied by a fused block.

The random numbers are those that the module would have drawn in the block's place, since it is the
module that draws them: from ones of the shape that its mask has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastres.kernels import dense

#: By class: whether a module multiplies by anything, and the shape of its mask for an activation.
Shape = Sequence[int]
_KNOWN: dict[type, tuple[Callable[[nn.Module], bool], Callable[[Shape], Shape]]] = {}


def register_drop(
    cls: type, works: Callable[[nn.Module], bool], shape: Callable[[Shape], Shape]
) -> None:
    """Announce a class of modules that multiply by random numbers.

    Args:
        cls: module(x) must be x times a mask that depends on the shape, dtype and layout of x
            alone.
        works: whether a module of the class draws anything, in the mode in which it is.
        shape: of the mask, for an activation of shape [N, C, H, W].
    """
    _KNOWN[cls] = works, shape


def _drops(module: nn.Module) -> bool:
    return module.training and bool(module.p)


register_drop(nn.Dropout, _drops, lambda shape: shape)
register_drop(nn.Dropout2d, _drops, lambda shape: (*shape[:2], 1, 1))


def draws(module: nn.Module) -> bool:
    """Whether a module is known to multiply by random numbers and do nothing else."""
    return type(module) in _KNOWN


def works(module: nn.Module) -> bool:
    """Whether a module that `draws` does so in the mode in which it is."""
    return _KNOWN[type(module)][0](module)


def draw(module: nn.Module, x: Tensor, shape: Shape, fmt: torch.memory_format) -> Tensor:
    """The factor by which a module multiplies an activation of [N, C, H, W] `shape`.

    It has the dtype and device of x, and the layout `fmt` that the activation would have.
    """
    ones = x.new_ones(tuple(_KNOWN[type(module)][1](shape)))
    factor: Tensor = module(dense(ones, fmt))
    return factor
