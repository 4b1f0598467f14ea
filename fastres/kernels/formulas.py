"""Registers functions of `fastres.kernels.reference` as a backend's primitives.

The registered signature is that of the reference function without `channels_last`, which is
read off the first tensor, and without `acc`, which the backend decides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import reference
from fastres.kernels.backend import Backend, declare
from fastres.kernels.registry import register
from fastres.kernels.types import is_channels_last

#: The primitives around the convolutions.
POINTWISE = (
    "channel_stats",
    "scale_shift_act",
    "bn_act_backward_reduce",
    "bn_act_backward_apply",
    "add_act",
    "act_backward",
)
POOLING = ("scale_shift_act_pool", "max_pool_backward")
CONVOLUTIONS = ("conv_forward", "conv_backward_data", "conv_backward_weight", "conv_bn_act")


def register_formulas(
    backend: str, primitives: Sequence[str], acc: Callable[[torch.dtype], torch.dtype]
) -> None:
    """Register `primitives` for `backend`, with arithmetic in `acc(dtype of the activations)`."""
    for name in primitives:
        register(name, backend, name="formula")(bind(getattr(reference, name), acc))
    register("finalize_stats", backend, name="formula")(reference.finalize_stats)


def bind(
    function: Callable[..., Any], acc: Callable[[torch.dtype], torch.dtype]
) -> Callable[..., Any]:
    """A reference function as a primitive: layout off the first tensor, arithmetic by `acc`."""
    takes_layout = "channels_last" in inspect.signature(function).parameters

    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if takes_layout:
            kwargs["channels_last"] = is_channels_last(first)
        return function(first, *args, acc=acc(first.dtype), **kwargs)

    return run


#: Every primitive in float64, rounded only where it is stored.
declare(Backend("reference", ("cpu", "cuda", "meta"), why_not=lambda: None))
register("update_running", "reference", name="formula")(reference.update_running)
register_formulas(
    "reference", (*POINTWISE, *POOLING, *CONVOLUTIONS), acc=lambda dtype: torch.float64
)
