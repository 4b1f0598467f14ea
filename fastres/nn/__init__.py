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
from fastres.nn.match import Decline, Parts, Projection, Steps
from fastres.nn.modules import BNAddReLU, BNReLU, ConvBNReLU

__all__ = [
    "BNAddReLU",
    "BNReLU",
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU",
    "Decline",
    "DropPath",
    "EfficientChannelAttention",
    "FusedModule",
    "Parts",
    "PreActBasicBlock",
    "PreActBottleneck",
    "Projection",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcitation",
    "Steps",
    "WideBasicBlock",
    "register_drop",
    "register_gate",
]
