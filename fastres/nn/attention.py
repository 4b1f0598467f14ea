"""Residual blocks with channel attention and stochastic depth, fused."""

from __future__ import annotations

from fastres.nn import stock_attention
from fastres.nn.blocks import FusedModule, three_layers, two_layers
from fastres.nn.match import Parts


class SEBasicBlock(FusedModule, stock_attention.SEBasicBlock):
    __doc__ = stock_attention.SEBasicBlock.__doc__

    def _parts(self) -> Parts:
        return with_attention(two_layers(self), self)


class SEBottleneck(FusedModule, stock_attention.SEBottleneck):
    __doc__ = stock_attention.SEBottleneck.__doc__

    def _parts(self) -> Parts:
        return with_attention(three_layers(self), self)


def with_attention(parts: Parts, block: SEBasicBlock | SEBottleneck) -> Parts:
    """The parts of a block with its attention and its stochastic depth behind the last norm."""
    m = block._modules
    last = parts.units[-1]._replace(drop=m["drop_path"])
    return parts._replace(units=(*parts.units[:-1], last), gate=m["attention"])
