"""Residual blocks that run fused where they can, and as their stock class where they cannot."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from fastres.nn import stock
from fastres.nn.fused import FusedParts, run_fused
from fastres.nn.match import Parts, Steps


class FusedModule(FusedParts):
    """Comes before a stock class among the bases, and runs its forward fused where it can.

    What cannot be fused goes to the next class's forward, which calls the children as modules,
    hooks and all.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The stock class's forward, in one fused operation where that is possible."""
        out = run_fused(self, x)
        return super().forward(x) if out is None else out


def two_layers(block: Any) -> Parts:
    """The parts of a block with the attribute names of torchvision's BasicBlock."""
    m = block._modules
    relu = m["relu"]
    units = (Steps(m["conv1"], m["bn1"], relu), Steps(m["conv2"], m["bn2"]))
    return Parts(units, relu, projection=block.downsample)


def three_layers(block: Any) -> Parts:
    """The parts of a block with the attribute names of torchvision's Bottleneck."""
    m = block._modules
    relu = m["relu"]
    units = (
        Steps(m["conv1"], m["bn1"], relu),
        Steps(m["conv2"], m["bn2"], relu),
        Steps(m["conv3"], m["bn3"]),
    )
    return Parts(units, relu, projection=block.downsample)


def _class_for(cls: type[Any], own: type[Any], name: str) -> type[Any]:
    """`own`, or its subclass that torchvision's ResNet recognises, where that is in use."""
    if cls is not own or "torchvision.models.resnet" not in sys.modules:
        return cls
    try:
        from fastres.nn import _torchvision
    except Exception:
        return cls
    found: type[Any] = getattr(_torchvision, name)
    return found


def rebuild(cls: Any) -> Any:
    """An empty block of the class `cls`: the one that suits the process that loads it."""
    return cls.__new__(cls)


class BasicBlock(FusedModule, stock.BasicBlock):
    """Drop-in for torchvision's BasicBlock, run as one fused operation.

    Arguments, attributes, parameters, errors and results are those of
    `fastres.nn.stock.BasicBlock`; whatever cannot be fused runs as that class does, and
    `fastres.explain` says why.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> BasicBlock:
        own = _class_for(cls, BasicBlock, "BasicBlock")
        made: BasicBlock = super().__new__(own)
        return made

    def _parts(self) -> Parts:
        return two_layers(self)


class Bottleneck(FusedModule, stock.Bottleneck):
    """Drop-in for torchvision's Bottleneck, run as one fused operation.

    Arguments, attributes, parameters, errors and results are those of
    `fastres.nn.stock.Bottleneck`; whatever cannot be fused runs as that class does, and
    `fastres.explain` says why.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Bottleneck:
        own = _class_for(cls, Bottleneck, "Bottleneck")
        made: Bottleneck = super().__new__(own)
        return made

    def _parts(self) -> Parts:
        return three_layers(self)
