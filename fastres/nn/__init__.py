"""Modules: drop-in residual blocks and their parts, with torch's parameters and semantics."""

from fastres.nn.blocks import BasicBlock, Bottleneck, FusedModule
from fastres.nn.modules import BNAddReLU, BNReLU, ConvBNReLU

__all__ = ["BNAddReLU", "BNReLU", "BasicBlock", "Bottleneck", "ConvBNReLU", "FusedModule"]
