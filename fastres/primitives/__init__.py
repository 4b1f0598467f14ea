"""The vocabulary of the engine: what a primitive is given, what it returns, who implements it.

Every layer that runs something speaks in these types; `docs/design.md` section 5 lists the
primitives, and the functions of `fastres.reference` are their definition.
"""

from fastres.primitives.registry import (
    PRIMITIVES,
    Implementation,
    Request,
    implementations,
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

__all__ = [
    "PRIMITIVES",
    "STATS_ROWS",
    "Branch",
    "ConvSpec",
    "Gate",
    "Gated",
    "Implementation",
    "PendingGrad",
    "Prologue",
    "Request",
    "acc_dtype",
    "dense",
    "implementations",
    "is_channels_last",
    "mask_shape",
    "memory_format_of",
    "register",
    "select",
]
