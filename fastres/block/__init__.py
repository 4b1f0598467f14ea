"""A residual block: its specification, its plan, its operators, forward and backward."""

from fastres.block.add import add_act
from fastres.block.backward import run_backward
from fastres.block.call import run_layers, run_open, try_layers, why_not_layers
from fastres.block.forward import run_forward
from fastres.block.layers import Layer, Size, pair
from fastres.block.plan import Context, Plan, context_of, make_plan
from fastres.block.settings import current, known_backend, use_backend, use_level, use_memory
from fastres.block.spec import (
    LEVELS,
    SHORTCUTS,
    UNIT_TENSORS,
    Block,
    Norm,
    PoolSpec,
    Unit,
    decode,
)
from fastres.block.stock import activate
from fastres.block.tensors import UnitTensors, output_metas, output_shapes, split_tensors

__all__ = [
    "LEVELS",
    "SHORTCUTS",
    "UNIT_TENSORS",
    "Block",
    "Context",
    "Layer",
    "Norm",
    "Plan",
    "PoolSpec",
    "Size",
    "Unit",
    "UnitTensors",
    "activate",
    "add_act",
    "context_of",
    "current",
    "decode",
    "known_backend",
    "make_plan",
    "output_metas",
    "output_shapes",
    "pair",
    "run_backward",
    "run_forward",
    "run_layers",
    "run_open",
    "split_tensors",
    "try_layers",
    "use_backend",
    "use_level",
    "use_memory",
    "why_not_layers",
]
