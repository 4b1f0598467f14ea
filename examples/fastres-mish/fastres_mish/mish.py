"""Mish (Misra 2019), v*tanh(softplus(v)), in all of fastres' Triton kernels.

With e = exp(v) and n = e*(e + 2): tanh(softplus(v)) = n/(n + 2), and 1 - tanh(.) = 2/(n + 2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastres.kernels import register_activation


def mish_derivative(v: Tensor) -> Tensor:
    """t + v*sigmoid(v)*(1 - t^2) with t = tanh(softplus(v))."""
    t = torch.tanh(F.softplus(v))
    return t + v * torch.sigmoid(v) * (1 - t * t)


@triton.jit
def powers(v):
    e = tl.exp(tl.minimum(v, 20.0))  # beyond, mish(v) is v
    return e, e * (e + 2.0)


@triton.jit
def mish_value(v):
    _, n = powers(v)
    return v * (n / (n + 2.0))


@triton.jit
def mish_slope(v):
    e, n = powers(v)
    t = n / (n + 2.0)
    return t + v * (e / (1.0 + e)) * (1.0 + t) * (2.0 / (n + 2.0))


# |mish'| ends at 1.0884 and |mish''| at 0.64.
register_activation(
    "mish", F.mish, mish_derivative, slope=1.09, curvature=0.65, triton=(mish_value, mish_slope)
)
