"""Primitives: what each is given and returns, who implements it, and the implementations.

Importing this package registers every backend that can be imported; `BACKENDS` lists them all,
with the reason where one is not available. docs/design.md section 5 lists the primitives, and
`fastres.kernels.reference` defines them by functions of the same names.
"""

from fastres.kernels import aten, cpu, cuda, formulas, reference, triton
from fastres.kernels.activation import activation, activations, register_activation
from fastres.kernels.backend import BACKENDS, Backend, Record, declare, preference
from fastres.kernels.reference import Activation
from fastres.kernels.registry import (
    COMPOSITES,
    IN_PLACE,
    PRIMITIVES,
    Implementation,
    Request,
    implementations,
    load_extensions,
    register,
    registrations,
    select,
)
from fastres.kernels.types import (
    STATS_ROWS,
    Branch,
    Conv,
    Gate,
    Gated,
    MaxPool,
    PendingGrad,
    Prologue,
    RunningUpdate,
    acc_dtype,
    dense,
    is_channels_last,
    mask_shape,
    memory_format_of,
)

__all__ = [
    "BACKENDS",
    "COMPOSITES",
    "IN_PLACE",
    "PRIMITIVES",
    "STATS_ROWS",
    "Activation",
    "Backend",
    "Branch",
    "Conv",
    "Gate",
    "Gated",
    "Implementation",
    "MaxPool",
    "PendingGrad",
    "Prologue",
    "Record",
    "Request",
    "RunningUpdate",
    "acc_dtype",
    "activation",
    "activations",
    "aten",
    "cpu",
    "cuda",
    "declare",
    "dense",
    "formulas",
    "implementations",
    "is_channels_last",
    "load_extensions",
    "mask_shape",
    "memory_format_of",
    "preference",
    "reference",
    "register",
    "register_activation",
    "registrations",
    "select",
    "triton",
]
