"""Case builder: the tensors of a case that calls of primitives take, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import (
    Branch,
    Gate,
    Request,
    acc_dtype,
    activation,
    activations,
    implementations,
    is_channels_last,
    reference,
)
from fastres.kernels.activation import BUILT_IN
from fastres.testing.cases import Case

F64 = torch.float64


@dataclass(frozen=True)
class Call:
    """One call of a primitive.

    Attributes:
        label: the variant, for messages.
        request: what the implementation's predicate is asked.
        args: positional arguments.
        kwargs: keyword arguments.
        in_place: index of the positional argument that is also given as `out`, or None.
    """

    label: str
    request: Request
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    in_place: int | None = None


@dataclass(frozen=True)
class Builder:
    """Builds the tensors of a case, in the dtypes that a backend's own primitives use."""

    case: Case
    backend: str
    device: str = "cpu"

    def request(self, like: Tensor, **more: Any) -> Request:
        """A request for activations like this one."""
        return Request(self.device, like.dtype, is_channels_last(like), **more)

    def x(self, seed: str = "x", shape: tuple[int, ...] | None = None) -> Tensor:
        """An activation."""
        return self.case.activation(seed, shape=shape, device=self.device)

    def grad(self, seed: str = "grad", shape: tuple[int, ...] | None = None) -> Tensor:
        """A gradient."""
        return self.case.gradient(seed, shape=shape, device=self.device)

    def vector(self, seed: str, size: int, near: float = 0.0) -> Tensor:
        """A parameter of a batch norm: float32, or float64 beside float64 activations."""
        dtype = acc_dtype(self.case.dtype)
        return self.case.vector(seed, size, near=near, dtype=dtype, device=self.device)

    def as_returned(self, primitive: str, value: Tensor) -> Tensor:
        """`value`, a state or sums, in the dtype of the backend's own `primitive`."""
        probe = self.case.activation("probe", shape=(1, 1, 1, 2), device=self.device)
        stats = torch.ones(5, 1, dtype=acc_dtype(probe.dtype), device=self.device)
        args = () if primitive == "channel_stats" else (Gate("none"), (Branch(probe, stats),))
        for entry in implementations(primitive, self.backend):
            if entry.why_not(self.request(probe)) is None:
                return value.to(entry.run(probe, *args).dtype)
        return value.to(acc_dtype(self.case.dtype))

    def stats(self, y: Tensor, seed: str = "stats") -> Tensor:
        """`stats` [5, C] of y; in exact cases powers of two and integers, whatever y is."""
        c, dtype = y.shape[1], acc_dtype(y.dtype)
        weight, bias = self.vector(seed + "w", c, 1.0), self.vector(seed + "b", c, 0.2)
        if self.case.exact:
            mean, invstd = self.vector(seed + "m", c), self.vector(seed + "i", c, 1.0)
            scale = weight * invstd
            return torch.stack([mean, invstd.pow(-2), invstd, scale, bias - mean * scale])
        count = y.numel() // max(c, 1)
        state = reference.channel_stats(y.to(F64))
        return reference.finalize_stats(state, count, None, weight, bias, 1e-5, acc=dtype)

    def running(self, size: int) -> tuple[Tensor, Tensor]:
        """(running_mean, running_var)."""
        return self.vector("mean", size), self.vector("var", size, 1.0).abs()

    def mask(self, like: Tensor, act: str = "relu") -> Gate:
        """A gate by random bits for an activation like this one; about 6 of 10 are set."""
        bits = self.grad("gate", tuple(like.shape)) < 0.25
        return Gate("mask", reference.pack_mask(bits, is_channels_last(like)), act)

    @property
    def weight(self) -> Tensor:
        """The convolution's weight."""
        return self.case.weight(device=self.device)

    @property
    def acts(self) -> list[str]:
        """ReLU and what is registered from outside, or in a case for activations every one but
        "none"; in exact cases those that round nothing.
        """
        without_relu = [name for name in BUILT_IN if name != "relu"]
        left_out = ["none"] if self.case.every_act else without_relu
        names = [name for name in activations() if name not in left_out]
        return [name for name in names if is_gate(name) or not self.case.exact]


def is_gate(act: str) -> bool:
    """Whether the derivative is 0 or 1 and can be read off the output.

    Only then may the activation follow a shortcut: the gate is kept as bits. Any other is formed
    again from the one branch in front of it, so it is called with one branch and no residual.
    """
    return activation(act).gate is not None


def column(vector: Tensor) -> Tensor:
    """The same values as a column of a matrix, whose other columns are NaN."""
    matrix = vector.new_full((len(vector), 3), float("nan"))
    matrix[:, 1] = vector
    return matrix[:, 1]


def expanded(vector: Tensor) -> Tensor:
    """The first value everywhere, with a stride of 0; NaN follows it in memory."""
    value = vector.new_full((2,), float("nan"))
    value[:1] = vector[:1]
    return value[:1].expand(len(vector))


def tagged(label: str, act: str) -> str:
    """A label that says which activation, where it is none of fastres' own."""
    return label if act in ("none", "relu") else f"{label}, {act}"


def unambiguous(grad: Tensor, y: Tensor, stats: Tensor, act: str) -> Tensor:
    """`grad` without the places where a rounding of scale*y + shift makes act' jump.

    A gate that is recomputed may go either way there, and so may a derivative beside a kink, and
    the gradient with it: 4 roundings, of the product, the sum, the scale and the shift.
    """
    formulas = activation(act)
    scale, shift = (row.view(1, -1, 1, 1).to(F64) for row in stats[3:])
    product = y.to(F64) * scale
    band = 4 * torch.finfo(stats.dtype).eps * (product.abs() + shift.abs())
    low, high = product + shift - band, product + shift + band
    if formulas.gate is None:
        jumps = torch.zeros_like(low, dtype=torch.bool)
        for kink in formulas.kinks:
            jumps |= (low <= kink) & (kink <= high)
    else:
        one, other = (formulas.gate(reference.activate(v, act).to(y.dtype)) for v in (low, high))
        jumps = one != other
    return grad.clone().masked_fill_(jumps, 0)
