"""Norms that are frozen by their class, as torchvision's FrozenBatchNorm2d.

They are known by what their forward was found to compute, which `fastres.convert.frozen` finds
out; this is where it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

#: What such a norm has, as parameters or buffers.
TENSORS = ("weight", "bias", "running_mean", "running_var")


class Frozen(NamedTuple):
    """What a class's forward computes: weight * (x - mean) / sqrt(var + eps) + bias, and `behind`.

    Attributes:
        forward: the function that was looked into; the class may get another one.
        eps: added to the variance, or None where it is the module's attribute `eps`.
        behind: names of the children that are called behind it, in their order.
        promotes: whether an x of lower precision than the tensors comes out in theirs.
    """

    forward: Any
    eps: float | None
    behind: tuple[str, ...]
    promotes: bool


_FROZEN: dict[type, Frozen] = {}


def register_frozen(cls: type, frozen: Frozen) -> None:
    """Keep what a class was found to compute."""
    _FROZEN[cls] = frozen


def frozen_of(module: nn.Module | None) -> Frozen | None:
    """What is known of a module that is a frozen norm, as its class now stands."""
    return frozen_of_class(type(module))


def frozen_of_class(cls: Any) -> Frozen | None:
    """What is known of a class, as it now stands."""
    known = _FROZEN.get(cls)
    return known if known is not None and cls.forward is known.forward else None


def has_tensors(module: nn.Module) -> bool:
    """Whether a module has the four tensors, each of one dimension."""
    tables = (module._parameters, module._buffers)
    found = [next((table[n] for table in tables if n in table), None) for n in TENSORS]
    return all([isinstance(t, Tensor) and t.dim() == 1 for t in found])


def frozen_children(module: nn.Module, frozen: Frozen) -> Sequence[nn.Module | None]:
    """The children that a frozen norm calls behind its arithmetic."""
    return [module._modules.get(name) for name in frozen.behind]
