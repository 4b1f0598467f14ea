"""Residual blocks that run fused where they can, and as their stock class where they cannot."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from torch import Tensor

from fastres.nn import stock
from fastres.nn.fused import FusedParts, run_fused
from fastres.nn.match import Parts, Steps, children_of


class FusedModule(FusedParts):
    """Comes before a stock class among the bases, and runs its forward fused where it can.

    What cannot be fused goes to the next class's forward, which calls the children as modules,
    hooks and all.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The stock class's forward, in one fused operation where that is possible."""
        out = run_fused(self, x)
        return super().forward(x) if out is None else out


def post_activation(block: Any, count: int) -> Parts:
    """The parts of a block of `count` convolutions with torchvision's attribute names."""
    m = children_of(block)
    relu = m["relu"]
    units = [Steps(m[f"conv{i}"], m[f"bn{i}"], relu) for i in range(1, count + 1)]
    units[-1] = units[-1]._replace(act=None)
    return Parts(tuple(units), relu, projection=block.downsample)


def with_attention(parts: Parts, block: Any) -> Parts:
    """The parts of a block with its attention and its stochastic depth behind the last norm."""
    m = children_of(block)
    last = parts.units[-1]._replace(drop=m["drop_path"])
    return parts._replace(units=(*parts.units[:-1], last), gate=m["attention"])


def pre_activation(block: Any, count: int, shortcut: str) -> Parts:
    """The parts of a pre-activation block: a unit ends where the next convolution begins."""
    m = children_of(block)
    relu = m["relu"]
    inner = [Steps(m[f"conv{i}"], m[f"bn{i + 1}"], relu) for i in range(1, count)]
    last = Steps(m[f"conv{count}"], drop=m["drop_path"])
    units = (Steps(None, m["bn1"], relu), *inner, last)
    return Parts(units, None, shortcut, block.downsample)


class _AsTorchvision(FusedModule):
    """Makes torchvision's classes of the same name bases of ours once torchvision is in use.

    Its ResNet tells blocks apart by isinstance when it sets their last norm to zero.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        resnet = sys.modules.get("torchvision.models.resnet")
        for ours in (BasicBlock, Bottleneck):
            theirs = getattr(resnet, ours.__name__, None)
            if theirs is not None and theirs not in ours.__mro__:
                with suppress(TypeError):  # A user's subclass has the two in another order.
                    ours.__bases__ = (*ours.__bases__, theirs)  # type: ignore[misc]
        return super().__new__(cls)


class BasicBlock(_AsTorchvision, stock.BasicBlock):
    """Drop-in for torchvision's BasicBlock, run as one fused operation.

    Arguments, attributes, parameters, errors and results are those of
    `fastres.nn.stock.BasicBlock`; whatever cannot be fused runs as that class does, and
    `fastres.explain` says why.
    """

    def _parts(self) -> Parts:
        return post_activation(self, 2)


class Bottleneck(_AsTorchvision, stock.Bottleneck):
    """Drop-in for torchvision's Bottleneck, run as one fused operation.

    Arguments, attributes, parameters, errors and results are those of
    `fastres.nn.stock.Bottleneck`; whatever cannot be fused runs as that class does, and
    `fastres.explain` says why.
    """

    def _parts(self) -> Parts:
        return post_activation(self, 3)


class SEBasicBlock(FusedModule, stock.SEBasicBlock):
    __doc__ = stock.SEBasicBlock.__doc__

    def _parts(self) -> Parts:
        return with_attention(post_activation(self, 2), self)


class SEBottleneck(FusedModule, stock.SEBottleneck):
    __doc__ = stock.SEBottleneck.__doc__

    def _parts(self) -> Parts:
        return with_attention(post_activation(self, 3), self)


class PreActBasicBlock(FusedModule, stock.PreActBasicBlock):
    __doc__ = stock.PreActBasicBlock.__doc__

    def _parts(self) -> Parts:
        return pre_activation(self, 2, self.shortcut)


class PreActBottleneck(FusedModule, stock.PreActBottleneck):
    __doc__ = stock.PreActBottleneck.__doc__

    def _parts(self) -> Parts:
        return pre_activation(self, 3, self.shortcut)


class WideBasicBlock(FusedModule, stock.WideBasicBlock):
    __doc__ = stock.WideBasicBlock.__doc__

    def _parts(self) -> Parts:
        shortcut = "input" if self.downsample is None else "activated"
        parts = pre_activation(self, 2, shortcut)
        first, middle, last = parts.units
        return parts._replace(
            units=(first, middle._replace(drop=children_of(self)["dropout"]), last)
        )
