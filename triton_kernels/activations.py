"""Activations as pairs of functions that kernels are given: the value, and the derivative.

Both take a float32 block v. A derivative of 0 or 1 that can be read off what was stored is a gate:
it gives booleans, and is asked about the stored value. A kernel gets them as constants, so each
pair has binaries of its own.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import to_storage


@triton.jit
def backward(g, v, dtype: tl.constexpr, DERIVATIVE: tl.constexpr):
    """g * act'(v); of a gate g or 0, by v as forward stored it."""
    derivative = DERIVATIVE(v)
    if derivative.dtype == tl.int1:
        # Where the activation would have made a zero, its argument is none that passes either.
        return tl.where(DERIVATIVE(to_storage(v, dtype).to(tl.float32)), g, 0.0)
    else:
        return g * derivative


@triton.jit
def identity(v):
    return v


@triton.jit
def identity_gate(v):
    return tl.full(v.shape, True, tl.int1)


@triton.jit
def relu(v):
    """A comparison, not a maximum: torch's ReLU lets NaN and -0.0 through."""
    return tl.where(v < 0.0, 0.0, v)


@triton.jit
def relu_operand(v):
    """ReLU of what goes into a product, where no zero's sign matters; NaN passes."""
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_gate(v):
    """Where ReLU's gradient passes, by its output: not (v <= 0), so NaN passes."""
    return ~(v <= 0.0)


@triton.jit
def relu6(v):
    return tl.where(v < 0.0, 0.0, tl.where(v > 6.0, 6.0, v))


@triton.jit
def relu6_gate(v):
    """Closed for NaN, as in torch."""
    return (v > 0.0) & (v < 6.0)


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def silu_derivative(v):
    s = 1.0 / (1.0 + tl.exp(-v))
    return s * (1.0 + v * (1.0 - s))


@triton.jit
def gelu(v):
    return v * (0.5 * (1.0 + tl.erf(v * 0.7071067811865476)))


@triton.jit
def gelu_derivative(v):
    """Phi(v) + v*phi(v), of the standard normal distribution."""
    density = 0.3989422804014327 * tl.exp(-0.5 * v * v)
    return 0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * density


@triton.jit
def gelu_tanh(v):
    """v*(1 + tanh(u))/2 = v/(1 + exp(-2u)) with 2u = 1.5957...*(v + 0.044715*v^3)."""
    return v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))


@triton.jit
def gelu_tanh_derivative(v):
    p = tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v))
    s = 1.0 / (1.0 + p)
    rest = tl.where(v > 0.0, p * s, 1.0 - s)  # 1 - s without cancellation
    return s + v * (s * rest) * (1.5957691216057308 * (1.0 + 0.134145 * v * v))


@triton.jit
def leaky_relu(v):
    return tl.where(v > 0.0, v, v * 0.01)


@triton.jit
def leaky_relu_derivative(v):
    return tl.where(v > 0.0, 1.0, 0.01)


@triton.jit
def hardswish(v):
    return v * relu6(v + 3.0) / 6.0


@triton.jit
def hardswish_derivative(v):
    """At the kinks that of the outer pieces, as in torch."""
    return tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, 1.0, v / 3.0 + 0.5))


class Functions(NamedTuple):
    """How kernels compute an activation; `operand` is its value where no zero's sign matters."""

    value: Any
    derivative: Any
    operand: Any


def _pair(value: Any, derivative: Any) -> Functions:
    return Functions(value, derivative, value)


#: By the names that blocks know.
FUNCTIONS = {
    "none": _pair(identity, identity_gate),
    "relu": Functions(relu, relu_gate, relu_operand),
    "relu6": _pair(relu6, relu6_gate),
    "silu": _pair(silu, silu_derivative),
    "gelu": _pair(gelu, gelu_derivative),
    "gelu_tanh": _pair(gelu_tanh, gelu_tanh_derivative),
    "leaky_relu": _pair(leaky_relu, leaky_relu_derivative),
    "hardswish": _pair(hardswish, hardswish_derivative),
}
