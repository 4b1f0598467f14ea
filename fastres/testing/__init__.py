"""The parity harness: cases, the 2x rule, and checks of implementations and of whole blocks.

For kernel developers: register an implementation, and `check_implementation` holds it to its
definition on every case. For users: `check_block` holds a fused module to a stock one.
"""

from fastres.testing.activations import check_activation
from fastres.testing.blocks import (
    BENCH_BLOCKS,
    BLOCK_CASES,
    BlockCase,
    FunctionalBlock,
    StockBlock,
)
from fastres.testing.builder import Call
from fastres.testing.calls import calls
from fastres.testing.cases import BENCH_CASES, CASES, VALUES, Case
from fastres.testing.compare import assert_parity, assert_same_bits
from fastres.testing.modules import check_block
from fastres.testing.parity import Outcome, check_implementation
from fastres.testing.poison import poisoned_allocations
from fastres.testing.saved import saved_bytes

__all__ = [
    "BENCH_BLOCKS",
    "BENCH_CASES",
    "BLOCK_CASES",
    "CASES",
    "VALUES",
    "BlockCase",
    "Call",
    "Case",
    "FunctionalBlock",
    "Outcome",
    "StockBlock",
    "assert_parity",
    "assert_same_bits",
    "calls",
    "check_activation",
    "check_block",
    "check_implementation",
    "poisoned_allocations",
    "saved_bytes",
]
