"""Modules: drop-in residual blocks and their parts, with torch's parameters and semantics."""

from fastres.nn.blocks import (
    BasicBlock,
    Bottleneck,
    FusedModule,
    PreActBasicBlock,
    PreActBottleneck,
    SEBasicBlock,
    SEBottleneck,
    WideBasicBlock,
)
from fastres.nn.factors import (
    DropPath,
    EfficientChannelAttention,
    SqueezeExcitation,
    register_drop,
    register_gate,
)
from fastres.nn.modules import BNAddReLU, BNReLU, ConvBNReLU

__all__ = [
    "BNAddReLU",
    "BNReLU",
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU",
    "DropPath",
    "EfficientChannelAttention",
    "FusedModule",
    "PreActBasicBlock",
    "PreActBottleneck",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcitation",
    "WideBasicBlock",
    "register_drop",
    "register_gate",
]
