"""The primitives around the convolutions, once for all backends that launch kernels of their own.

Memory for results and masks, activations without elements, and which gradients are wanted are the
same everywhere and stand here. A backend gives its launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastres.kernels.common import floats, gate_code, new_mask, zeros
from fastres.kernels.formulas import POINTWISE
from fastres.kernels.registry import WhyNot, register
from fastres.kernels.types import Branch, Gate


class Normalisation(NamedTuple):
    """out = act(scale*y + shift [+ residual, plain or scaled]), and its mask where it is wanted.

    Without `stats` y is taken as it is. `in_place`: out may be y.
    """

    y: Tensor
    stats: Tensor | None
    residual: Tensor | None
    residual_stats: Tensor | None
    act: str
    out: Tensor
    mask: Tensor | None
    in_place: bool = False


class Gradients(NamedTuple):
    """grad_y of the wanted branches in `grads`, and the gated gradient in `residual`.

    `sums` are None with running statistics, and else taken over `values` per channel. Without
    branches the gate is a mask's bits or the activation's output. `in_place`: an output may be
    grad_out.
    """

    grad_out: Tensor
    gate: Gate
    branches: Sequence[Branch] = ()
    sums: Tensor | None = None
    values: int = 0
    grads: tuple[Tensor | None, Tensor | None] = (None, None)
    residual: Tensor | None = None
    in_place: bool = False


class Launches(Protocol):
    """A backend's launches, over activations that have elements.

    The autotuner repeats a launch, but not one that works in place.
    """

    def channel_stats(self, y: Tensor, state: Tensor | None, prior_count: int) -> Tensor:
        """(mean, M2) float32 [2, C] of y, merged with `state` where that is given."""

    def finalize_stats(
        self, inputs: Sequence[Tensor | None], count: int, eps: float, stats: Tensor
    ) -> None:
        """`stats` from `inputs`: dense state, running mean and variance, weight and bias, [C]."""

    def scale_shift_act(self, call: Normalisation) -> None:
        """One pass."""

    def bn_act_backward_reduce(
        self, grad_out: Tensor, gate: Gate, branches: Sequence[Branch], sums: Tensor | None
    ) -> Tensor:
        """The sums float32 [3, C], added to `sums` where they are given."""

    def bn_act_backward_apply(self, call: Gradients) -> None:
        """One pass for both branches and the residual."""


class Pointwise:
    """The primitives of a backend, registered for it."""

    def __init__(self, backend: str, launches: Launches, why_not: WhyNot) -> None:
        self._launches = launches
        for primitive in (*POINTWISE, "finalize_stats"):
            register(primitive, backend, why_not=why_not)(getattr(self, primitive))

    def channel_stats(self, y: Tensor, state: Tensor | None = None, prior_count: int = 0) -> Tensor:
        """(mean, M2) per channel, float32 [2, C]; merged with `state` where it is given."""
        if y.numel() == 0:
            return zeros(2, y.shape[1], device=y.device) if state is None else state.clone()
        return self._launches.channel_stats(y, state, prior_count)

    def finalize_stats(
        self,
        state: Tensor | None,
        count: int,
        running: tuple[Tensor, Tensor] | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        acc: torch.dtype,
    ) -> Tensor:
        """`stats` float32 [5, C], computed in float64."""
        # Kernels read with a stride of 1; views of a parameter may have another.
        inputs = [
            None if t is None else t.contiguous()
            for t in (state, *(running or (None, None)), weight, bias)
        ]
        some = next(t for t in inputs if t is not None)
        stats = floats(5, some.shape[-1], device=some.device)
        if stats.numel():
            self._launches.finalize_stats(inputs, count, eps, stats)
        return stats

    def scale_shift_act(
        self,
        y: Tensor,
        stats: Tensor | None,
        *,
        residual: Tensor | None = None,
        residual_stats: Tensor | None = None,
        act: str = "none",
        want_mask: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """act(scale*y + shift [+ residual, plain or scaled]); `out` may be y."""
        result, in_place = torch.empty_like(y) if out is None else out, out is not None
        mask = new_mask(y) if want_mask else None
        if y.numel():
            call = Normalisation(y, stats, residual, residual_stats, act, result, mask, in_place)
            self._launches.scale_shift_act(call)
        return result, mask

    def bn_act_backward_reduce(
        self,
        grad_out: Tensor,
        gate: Gate,
        branches: Sequence[Branch],
        *,
        sums: Tensor | None = None,
    ) -> Tensor:
        """`sums` float32 [3, C]; added to `sums` where it is given."""
        if grad_out.numel() == 0:
            c, device = grad_out.shape[1], grad_out.device
            return zeros(3, c, device=device) if sums is None else sums.clone()
        return self._launches.bn_act_backward_reduce(grad_out, gate, branches, sums)

    def bn_act_backward_apply(
        self,
        grad_out: Tensor,
        gate: Gate,
        branches: Sequence[Branch],
        sums: Tensor,
        count: int,
        *,
        want_grads: Sequence[bool],
        want_residual: bool = False,
        out: Tensor | None = None,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """grad_y per branch, and the gated gradient itself on demand, in one pass."""
        memory = [out, *[None] * len(want_grads)]
        grads = [
            (torch.empty_like(grad_out) if t is None else t) if wanted else None
            for t, wanted in zip(memory, want_grads, strict=False)
        ]
        residual = torch.empty_like(grad_out) if want_residual else None
        if grad_out.numel():
            first, second = (*grads, None)[:2]
            self._launches.bn_act_backward_apply(Gradients(
                grad_out, gate, branches, sums if count else None, count, (first, second),
                residual, out is not None,
            ))  # fmt: skip
        return grads, residual

    def add_act(
        self, x: Tensor, residual: Tensor, *, act: str = "relu", want_mask: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """act(x + residual), and its mask."""
        return self.scale_shift_act(x, None, residual=residual, act=act, want_mask=want_mask)

    def act_backward(self, grad_out: Tensor, gate: Gate, *, out: Tensor | None = None) -> Tensor:
        """The gated gradient, into `out` where it is given."""
        if gate.kind == "affine":
            raise NotImplementedError("gate must be none, mask or out, got affine")
        result = torch.empty_like(grad_out) if out is None else out
        if gate_code(gate) == 0:
            return result.copy_(grad_out)
        if grad_out.numel():
            call = Gradients(grad_out, gate, residual=result, in_place=out is not None)
            self._launches.bn_act_backward_apply(call)
        return result
