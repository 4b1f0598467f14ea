"""Activations as Triton's kernels are given them: built in, or registered from outside."""

from __future__ import annotations

from typing import Any

from fastres.kernels.common import GATE_CODES, gate_code
from fastres.kernels.reference import ACTIVATIONS
from fastres.kernels.triton.launch import kernels
from fastres.kernels.types import Gate, Prologue


def functions_of(act: str) -> Any:
    """`value`, `derivative` and `operand` of an activation; this imports Triton."""
    built_in: dict[str, Any] = kernels().activations.FUNCTIONS
    if act in built_in:
        return built_in[act]
    value, derivative = ACTIVATIONS[act].kernels["triton"]
    return kernels().activations.Functions(value, derivative, value)


def output_flags(act: str, want_mask: bool) -> dict[str, Any]:
    """The constants of a kernel that applies an activation, and may keep its gate as bits."""
    functions = functions_of(act)
    return {"ACT": functions.value, "DERIVATIVE": functions.derivative if want_mask else None}


def gate_flags(gate: Gate, prefix: str = "") -> dict[str, Any]:
    """The constants of a kernel that applies a derivative; the bits of a mask say it themselves."""
    code = gate_code(gate)
    known = code in (GATE_CODES["none"], GATE_CODES["mask"])
    derivative = None if known else functions_of(gate.act).derivative
    return {f"{prefix}GATE": code, f"{prefix}DERIVATIVE": derivative}


def prologue_flags(prologue: Prologue | None) -> dict[str, Any]:
    """The constants of a kernel whose input may have a pending normalisation and activation."""
    if prologue is None:
        return {"HAS_PROLOGUE": False, "ACT_X": None}
    return {"HAS_PROLOGUE": True, "ACT_X": functions_of(prologue.act).operand}
