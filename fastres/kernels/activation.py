"""The activations that blocks may have: `reference.ACTIVATIONS`, open to new ones."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fastres.kernels.reference import ACTIVATIONS, Activation, formulas_of
from fastres.kernels.registry import load_extensions

Formula = Callable[[Tensor], Tensor]

#: Those that are fastres' own, and that its compiled kernels know.
BUILT_IN = tuple(ACTIVATIONS)


def register_activation(
    name: str,
    forward: Formula,
    derivative: Formula,
    *,
    slope: float = 1.0,
    curvature: float = 1.0,
    kinks: tuple[float, ...] = (),
    gate: Formula | None = None,
    triton: tuple[Any, Any] | None = None,
) -> None:
    """Announce an elementwise activation; from then on every backend knows it, by its formulas.

    With `triton`, all of fastres' Triton kernels compute it too.

    `fastres.testing.check_activation` holds the arguments to each other.

    Args:
        name: what users and specifications call it; a Python identifier.
        forward: act(v), for any floating dtype, differentiable by torch's autograd: it is also
            what runs where a block is not fused.
        derivative: act'(v), from what stands in front of the activation.
        slope: an upper bound of |act'|. Rounding v by e moves act(v) by at most slope*e, which the
            parity harness allows.
        curvature: an upper bound of |act''| between the kinks, likewise for the derivative.
        kinks: where act' jumps.
        gate: booleans, where act' is 1, from the output, if act' is 0 or 1 everywhere and the
            output says which. Such an activation may follow a shortcut: one bit per element is
            kept.
        triton: two `triton.jit` functions of a float32 block v: act(v), and act'(v), of an
            activation with a gate as booleans, for what was stored. They stand in a module whose
            source Triton can read, as all of its functions.

    Raises:
        ValueError: for a name that is taken or no identifier.
    """
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier, got {name!r}")
    if name in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is already registered")
    if gate is not None:
        slope, curvature = 1.0, 0.0
    kernels = MappingProxyType({} if triton is None else {"triton": triton})
    ACTIVATIONS[name] = Activation(forward, derivative, gate, slope, curvature, kinks, kernels)


def activation(name: str) -> Activation:
    """The formulas of an activation.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in ACTIVATIONS:
        load_extensions()
    return formulas_of(name)


def activations() -> tuple[str, ...]:
    """The names of all activations."""
    load_extensions()
    return tuple(ACTIVATIONS)
