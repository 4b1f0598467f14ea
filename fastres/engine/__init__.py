"""The block engine: BlockSpec -> Plan -> run."""

from fastres.engine.backward import run_backward
from fastres.engine.forward import run_forward
from fastres.engine.plan import Plan, make_plan, signature_of
from fastres.engine.settings import current, known_backend, use_backend, use_level, use_memory
from fastres.engine.spec import (
    LEVELS,
    SHORTCUTS,
    UNIT_TENSORS,
    BlockSpec,
    PoolSpec,
    UnitSpec,
    decode,
)
from fastres.engine.tensors import UnitTensors, output_metas, split_tensors

__all__ = [
    "LEVELS",
    "SHORTCUTS",
    "UNIT_TENSORS",
    "BlockSpec",
    "Plan",
    "PoolSpec",
    "UnitSpec",
    "UnitTensors",
    "current",
    "decode",
    "known_backend",
    "make_plan",
    "output_metas",
    "run_backward",
    "run_forward",
    "signature_of",
    "split_tensors",
    "use_backend",
    "use_level",
    "use_memory",
]
