"""What torch's modules ran as they were written, and whether they still run it.

A fused block stands for the functions of torch that its children would call. Tools replace those,
on a class or in a module, and rebind torch.nn.Conv2d and others to classes of their own.
"""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F
from torch.nn.modules.activation import GELU, Hardswish, LeakyReLU, ReLU, ReLU6, SiLU
from torch.nn.modules.batchnorm import BatchNorm2d
from torch.nn.modules.container import Sequential
from torch.nn.modules.conv import Conv2d
from torch.nn.modules.linear import Identity
from torch.nn.modules.module import Module
from torch.nn.modules.pooling import AvgPool2d, MaxPool2d

__all__ = [
    "GELU",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "Hardswish",
    "Identity",
    "LeakyReLU",
    "MaxPool2d",
    "ReLU",
    "ReLU6",
    "Sequential",
    "SiLU",
    "as_written",
    "replaced",
]


#: Where torch makes the functions that a flag chooses between, as F.max_pool2d by return_indices.
_DISPATCHED = "torch._jit_internal"


def as_written(owner: Any, name: str) -> Any:
    """owner.<name>, or None where it is already somebody else's when it is first looked at."""
    function = getattr(owner, name)
    home = getattr(function, "__globals__", {}).get("__name__")
    classes = getattr(owner, "__mro__", ())
    written = next((c.__module__ for c in classes if name in c.__dict__), owner.__name__)
    return function if home in (None, written, _DISPATCHED) else None


_WATCHED: tuple[tuple[Any, str], ...] = (
    (Conv2d, "forward"), (Conv2d, "_conv_forward"), (BatchNorm2d, "forward"),
    (BatchNorm2d, "_check_input_dim"), (ReLU, "forward"), (Identity, "forward"),
    (Sequential, "forward"), (AvgPool2d, "forward"), (Module, "__call__"), (F, "conv2d"),
    (F, "batch_norm"), (F, "relu"), (F, "avg_pool2d"), (GELU, "forward"), (Hardswish, "forward"),
    (LeakyReLU, "forward"), (ReLU6, "forward"), (SiLU, "forward"), (F, "gelu"), (F, "hardswish"),
    (F, "leaky_relu"), (F, "relu6"), (F, "hardtanh"), (F, "silu"),
    (MaxPool2d, "forward"), (F, "max_pool2d"),
)  # fmt: skip
_WRITTEN = tuple([as_written(owner, name) for owner, name in _WATCHED])


def replaced() -> str | None:
    """Which of torch's own functions is not the one that torch wrote, or None."""
    now = (
        Conv2d.forward, Conv2d._conv_forward, BatchNorm2d.forward, BatchNorm2d._check_input_dim,
        ReLU.forward, Identity.forward, Sequential.forward, AvgPool2d.forward, Module.__call__,
        F.conv2d, F.batch_norm, F.relu, F.avg_pool2d, GELU.forward, Hardswish.forward,
        LeakyReLU.forward, ReLU6.forward, SiLU.forward, F.gelu, F.hardswish, F.leaky_relu, F.relu6,
        F.hardtanh, F.silu, MaxPool2d.forward, F.max_pool2d,
    )  # fmt: skip
    if now == _WRITTEN:
        return None
    for (owner, name), written, function in zip(_WATCHED, _WRITTEN, now, strict=True):
        if written is not function:
            return f"{owner.__name__}.{name} is not torch's own"
    return None
