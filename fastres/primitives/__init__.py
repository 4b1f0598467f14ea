"""The vocabulary of the engine: what a primitive is given, what it returns, who implements it.

Every layer that runs something speaks in these types; `docs/design.md` section 5 lists the
primitives, and the functions of `fastres.reference` are their definition.
"""

from fastres.primitives.activation import activation, activations, register_activation
from fastres.primitives.registry import (
    COMPOSITES,
    PRIMITIVES,
    Implementation,
    Request,
    implementations,
    load_extensions,
    register,
    select,
)
from fastres.primitives.types import (
    STATS_ROWS,
    Branch,
    ConvSpec,
    Gate,
    Gated,
    PendingGrad,
    Prologue,
    acc_dtype,
    dense,
    is_channels_last,
    mask_shape,
    memory_format_of,
)
from fastres.reference import Activation

__all__ = [
    "COMPOSITES",
    "PRIMITIVES",
    "STATS_ROWS",
    "Activation",
    "Branch",
    "ConvSpec",
    "Gate",
    "Gated",
    "Implementation",
    "PendingGrad",
    "Prologue",
    "Request",
    "acc_dtype",
    "activation",
    "activations",
    "dense",
    "implementations",
    "is_channels_last",
    "load_extensions",
    "mask_shape",
    "memory_format_of",
    "register",
    "register_activation",
    "select",
]
