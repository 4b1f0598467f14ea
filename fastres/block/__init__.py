"""A residual block: its specification, its plan, its operators, forward and backward."""

from fastres.block.add import add_act
from fastres.block.backward import run_backward
from fastres.block.forward import run_forward
from fastres.block.op import run_block
from fastres.block.plan import Plan, make_plan, signature_of
from fastres.block.settings import current, known_backend, use_backend, use_level, use_memory
from fastres.block.spec import (
    LEVELS,
    SHORTCUTS,
    UNIT_TENSORS,
    BlockSpec,
    PoolSpec,
    UnitSpec,
    decode,
)
from fastres.block.tensors import UnitTensors, output_metas, split_tensors

__all__ = [
    "LEVELS",
    "SHORTCUTS",
    "UNIT_TENSORS",
    "BlockSpec",
    "Plan",
    "PoolSpec",
    "UnitSpec",
    "UnitTensors",
    "add_act",
    "current",
    "decode",
    "known_backend",
    "make_plan",
    "output_metas",
    "run_backward",
    "run_block",
    "run_forward",
    "signature_of",
    "split_tensors",
    "use_backend",
    "use_level",
    "use_memory",
]
