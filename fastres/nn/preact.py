"""Pre-activation blocks, fused: norm and ReLU in front of each convolution."""

from __future__ import annotations

from fastres.nn import stock_preact
from fastres.nn.blocks import FusedModule
from fastres.nn.match import Parts, Steps


class PreActBasicBlock(FusedModule, stock_preact.PreActBasicBlock):
    __doc__ = stock_preact.PreActBasicBlock.__doc__

    def _parts(self) -> Parts:
        m = self._modules
        relu = m["relu"]
        units = (
            Steps(None, m["bn1"], relu),
            Steps(m["conv1"], m["bn2"], relu),
            Steps(m["conv2"], drop=m["drop_path"]),
        )
        return Parts(units, None, self.shortcut, self.downsample)


class PreActBottleneck(FusedModule, stock_preact.PreActBottleneck):
    __doc__ = stock_preact.PreActBottleneck.__doc__

    def _parts(self) -> Parts:
        m = self._modules
        relu = m["relu"]
        units = (
            Steps(None, m["bn1"], relu),
            Steps(m["conv1"], m["bn2"], relu),
            Steps(m["conv2"], m["bn3"], relu),
            Steps(m["conv3"], drop=m["drop_path"]),
        )
        return Parts(units, None, self.shortcut, self.downsample)


class WideBasicBlock(FusedModule, stock_preact.WideBasicBlock):
    __doc__ = stock_preact.WideBasicBlock.__doc__

    def _parts(self) -> Parts:
        m = self._modules
        relu = m["relu"]
        units = (
            Steps(None, m["bn1"], relu),
            Steps(m["conv1"], m["bn2"], relu, m["dropout"]),
            Steps(m["conv2"], drop=m["drop_path"]),
        )
        shortcut = "input" if self.downsample is None else "activated"
        return Parts(units, None, shortcut, self.downsample)
