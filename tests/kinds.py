"""Kinds of residual blocks beside the classic ones, fused and as the textbook has them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from module_parity import randomise
from torch import Tensor, nn

from fastres.nn import (
    BasicBlock,
    Bottleneck,
    EfficientChannelAttention,
    PreActBasicBlock,
    PreActBottleneck,
    SEBasicBlock,
    SEBottleneck,
    SqueezeExcitation,
    WideBasicBlock,
    stock,
)

CHANNELS = 8

STOCK: dict[type, type] = {
    BasicBlock: stock.BasicBlock,
    Bottleneck: stock.Bottleneck,
    PreActBasicBlock: stock.PreActBasicBlock,
    PreActBottleneck: stock.PreActBottleneck,
    WideBasicBlock: stock.WideBasicBlock,
    SEBasicBlock: stock.SEBasicBlock,
    SEBottleneck: stock.SEBottleneck,
}


@dataclass(frozen=True)
class Kind:
    """A block of 8 input channels; `random` ones draw numbers in training."""

    name: str
    make: Callable[[], nn.Module]
    random: bool = False

    def __str__(self) -> str:
        return self.name

    def pair(
        self,
        dtype: torch.dtype = torch.float32,
        last: bool = True,
        training: bool = True,
        device: str = "cpu",
    ) -> tuple[nn.Module, nn.Module]:
        """(stock, fused) with the same random values."""
        torch.manual_seed(1)
        fused = randomise(self.make()).to(device, dtype, memory_format=_format(last))
        # Batch norms stay float32 below that.
        for m in fused.modules():
            if isinstance(m, nn.BatchNorm2d) and dtype.itemsize < 4:
                m.float()
        return twin(fused.train(training)), fused

    def input(
        self, dtype: torch.dtype = torch.float32, last: bool = True, device: str = "cpu",
        shape: tuple[int, int, int] = (8, 7, 6),
    ) -> Tensor:  # fmt: skip
        """A random input; a gradient is wanted."""
        n, h, w = shape
        g = torch.Generator().manual_seed(2)
        x = torch.randn(n, CHANNELS, h, w, generator=g, dtype=torch.float64)
        return x.to(device, dtype, memory_format=_format(last)).requires_grad_()


def _format(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def twin(fused: nn.Module) -> nn.Module:
    """A copy of a fused block that is of its stock class."""
    made = copy.deepcopy(fused)
    made.__class__ = STOCK[type(fused)]
    return made


def squeeze(channels: int) -> nn.Module:
    """Of six channels in the middle: of fewer values torch's own error is a matter of luck."""
    return SqueezeExcitation(channels, 6)


def projection(out: int, norm: bool, pool: bool = False) -> nn.Module:
    """A shortcut of stride 2."""
    parts: list[nn.Module] = [nn.Conv2d(CHANNELS, out, 1, 1 if pool else 2, bias=False)]
    if pool:
        parts.insert(0, nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False))
    if norm:
        parts.append(nn.BatchNorm2d(out))
    return nn.Sequential(*parts)


def with_bias(block: nn.Module) -> nn.Module:
    """Convolutions with a bias and no norm behind them: bn1 and bn2 are nn.Identity."""
    block.bn1, block.bn2 = nn.Identity(), nn.Identity()
    for name in ("conv1", "conv2"):
        old = getattr(block, name)
        setattr(block, name, nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1))
    return block


def without(block: nn.Module, *names: str) -> nn.Module:
    """A block some of whose children are nn.Identity, and nothing happens in place."""
    block.relu.inplace = False
    for name in names:
        setattr(block, name, nn.Identity())
    return block


KINDS = (
    Kind("preact-basic", lambda: PreActBasicBlock(8, 8)),
    Kind("preact-basic-activated", lambda: PreActBasicBlock(8, 8, shortcut="activated")),
    Kind("preact-basic-projection",
         lambda: PreActBasicBlock(8, 12, 2, projection(12, True), shortcut="input")),
    Kind("preact-bottleneck", lambda: PreActBottleneck(8, 2, groups=2)),
    Kind("preact-bottleneck-projection", lambda: PreActBottleneck(
        8, 3, 2, projection(12, False, True), shortcut="activated")),
    Kind("wide", lambda: WideBasicBlock(8, 8)),
    Kind("wide-projection", lambda: WideBasicBlock(8, 12, 2)),
    Kind("se-basic", lambda: SEBasicBlock(8, 8, attention=squeeze)),
    Kind("se-bottleneck-projection",
         lambda: SEBottleneck(8, 3, 2, projection(12, True), attention=squeeze)),
    Kind("eca-bottleneck-pooled", lambda: SEBottleneck(
        8, 3, 2, projection(12, True, True), attention=EfficientChannelAttention)),
)  # fmt: skip

#: The blocks of the first residual networks.
CLASSIC = (
    Kind("basic", lambda: BasicBlock(8, 8)),
    Kind("basic-projection", lambda: BasicBlock(8, 12, 2, projection(12, True))),
    Kind("bottleneck", lambda: Bottleneck(8, 2)),
    Kind("bottleneck-pooled", lambda: Bottleneck(8, 3, 2, projection(12, True, True))),
)

#: Blocks in which steps are missing.
SPARSE = (
    Kind("no-norms", lambda: with_bias(BasicBlock(8, 8))),
    Kind("no-norms-se", lambda: with_bias(SEBasicBlock(8, 8, attention=squeeze))),
    Kind("first-norm", lambda: without(BasicBlock(8, 8), "bn1")),
    Kind("no-activations", lambda: without(BasicBlock(8, 8), "relu")),
    Kind("no-activations-preact", lambda: without(PreActBottleneck(8, 2), "relu")),
    Kind("no-first-convolution", lambda: without(BasicBlock(8, 8), "conv1")),
    Kind("no-first-unit-preact", lambda: without(
        PreActBasicBlock(8, 8, shortcut="activated"), "bn1", "relu")),
    Kind("no-second-unit-preact", lambda: without(PreActBasicBlock(8, 8), "conv1", "bn2")),
    Kind("no-last-convolution", lambda: without(PreActBasicBlock(8, 8), "conv2")),
)  # fmt: skip

#: Blocks that draw random numbers.
RANDOM = (
    Kind("wide-dropout", lambda: WideBasicBlock(8, 8, dropout=0.4), True),
    Kind("wide-dropout-projection", lambda: WideBasicBlock(8, 12, 2, dropout=0.4), True),
    Kind("wide-dropout2d", lambda: WideBasicBlock(8, 8, dropout=nn.Dropout2d(0.4)), True),
    Kind("preact-drop-path",
         lambda: PreActBottleneck(8, 3, 2, projection(12, False), drop_path=0.4), True),
    Kind("drop-path", lambda: SEBasicBlock(8, 8, attention=nn.Identity, drop_path=0.4), True),
    Kind("drop-path-projection", lambda: SEBottleneck(
        8, 3, 2, projection(12, True), attention=nn.Identity, drop_path=0.4), True),
    Kind("se-drop-path", lambda: SEBasicBlock(8, 8, attention=squeeze, drop_path=0.4), True),
    Kind("eca-drop-path-projection", lambda: SEBottleneck(
        8, 3, 2, projection(12, True), attention=EfficientChannelAttention, drop_path=0.4), True),
    Kind("both", lambda: WideBasicBlock(8, 8, dropout=0.4, drop_path=0.4), True),
)  # fmt: skip


def kind(name: str) -> Kind:
    """By its name."""
    return next(k for k in (*CLASSIC, *KINDS, *SPARSE, *RANDOM) if k.name == name)
