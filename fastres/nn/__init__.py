"""Modules: drop-in residual blocks and their parts, with torch's parameters and semantics."""

from fastres.nn.attention import SEBasicBlock, SEBottleneck
from fastres.nn.blocks import BasicBlock, Bottleneck, FusedModule
from fastres.nn.drop import DropPath, register_drop
from fastres.nn.gate import EfficientChannelAttention, SqueezeExcitation, register_gate
from fastres.nn.modules import BNAddReLU, BNReLU, ConvBNReLU
from fastres.nn.preact import PreActBasicBlock, PreActBottleneck, WideBasicBlock

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
