"""The operators: schemas, abstract implementations, and the one autograd Function."""

from fastres.ops.add import add_act
from fastres.ops.block import run_block

__all__ = ["add_act", "run_block"]
