"""Every primitive by formula, in chosen precisions: the truth, and what unfused torch computes.

The formulas are those of `fastres.kernels.reference`, which faults planted in an implementation do
not reach. What stands here besides is where unfused torch rounds in between, the composite backward
of a unit, and the magnitudes of the terms behind each result.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import (
    Conv,
    Gate,
    Gated,
    MaxPool,
    PendingGrad,
    Prologue,
    acc_dtype,
    activation,
    is_channels_last,
    reference,
)


@dataclass(frozen=True)
class Formulas:
    """`fastres.kernels.reference` with arithmetic in `acc`, convolutions in `conv_dtype`.

    With both float64, on inputs made float64, it is the truth. With torch's own choices it is
    the baseline: convolutions in the activations' dtype, everything around them unfused.
    """

    acc: torch.dtype
    conv_dtype: torch.dtype

    def run(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        """The primitive's result, in the form in which implementations return it."""
        unfused = getattr(self, f"_{primitive}", None)
        if unfused is not None:
            return unfused(*args, **kwargs)
        formula = getattr(reference, primitive)
        if "channels_last" in inspect.signature(formula).parameters:
            kwargs["channels_last"] = is_channels_last(args[0])
        if primitive != "finalize_stats":
            kwargs["acc"] = self.conv_dtype if primitive.startswith("conv_") else self.acc
        return formula(*args, **kwargs)

    def _input(self, x: Tensor, prologue: Prologue | None) -> Tensor:
        if prologue is None:
            return x
        z: Tensor = self.run("scale_shift_act", x, prologue.stats, act=prologue.act)[0]
        return z

    def _conv_forward(
        self, x: Tensor, *args: Any, prologue: Prologue | None = None, want_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        z = self._input(x, prologue)
        y, _ = reference.conv_forward(z, *args, acc=self.conv_dtype)
        return y, (self.run("channel_stats", y) if want_state else None)

    def _conv_backward_weight(
        self, grad_y: Tensor, x: Tensor, *args: Any, prologue: Prologue | None = None
    ) -> Tensor:
        z = self._input(x, prologue)
        return reference.conv_backward_weight(grad_y, z, *args, acc=self.conv_dtype)

    def _max_pool_backward(
        self, grad_out: Tensor, argmax: Tensor, pool: MaxPool, size: tuple[int, int]
    ) -> Tensor:
        """torch's own, which in 16 bits rounds after every addition."""
        like = grad_out.new_empty(*grad_out.shape[:2], *size)
        indices = reference.indices_of(argmax, pool, size[1])
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return backward(grad_out, like, *pool, indices)  # type: ignore[no-any-return]

    def _conv_bn_act(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, stats: Tensor,
        *, residual: Tensor | None = None, act: str = "none",
    ) -> Tensor:  # fmt: skip
        """Rounded after every step, as separate modules do."""
        y, _ = self.run("conv_forward", x, weight, bias, conv)
        z, _ = self.run("scale_shift_act", y, stats)
        if residual is not None:
            z = z + residual
        return reference.activate(z, act)

    def _conv_backward(
        self, grad: PendingGrad, x: Tensor, weight: Tensor, conv: Conv,
        *, prologue: Prologue | None, want_x: bool, want_weight: bool,
        accumulate: Tensor | Gated | None, reduce: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        (grad_y,), _ = self.run(
            "bn_act_backward_apply", grad.grad_out, grad.gate, (grad.branch,), grad.sums,
            grad.values, want_grads=(True,),
        )  # fmt: skip
        grad_x = grad_weight = sums = None
        if want_weight:
            grad_weight = self._conv_backward_weight(grad_y, x, weight, conv, prologue=prologue)
        if want_x:
            if isinstance(accumulate, Gated):
                accumulate = self.run("act_backward", accumulate.grad_out, accumulate.gate)
            grad_x = self.run("conv_backward_data", grad_y, weight, x, conv, accumulate=accumulate)
        if reduce is not None and grad_x is not None:
            sums = self.run("bn_act_backward_reduce", grad_x, reduce[0], (reduce[1],))
        return grad_x, grad_weight, sums


TRUTH = Formulas(torch.float64, torch.float64)


def torch_formulas(dtype: torch.dtype) -> Formulas:
    """What unfused torch computes for activations of `dtype`."""
    return Formulas(acc_dtype(dtype), dtype)


# ---------------------------------------------------------------- magnitudes


def magnitudes(primitive: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Sums of absolute values behind each result, for float64 arguments; see `assert_parity`.

    Keys are those of `fastres.testing.parity.named`; a result without an entry is held to the
    rounding of its own value alone.
    """
    function = _MAGNITUDES.get(primitive)
    return {} if function is None else function(*args, **kwargs)


def _column(v: Tensor) -> Tensor:
    return v.abs().view(1, -1, 1, 1)


def _affine(y: Tensor, stats: Tensor) -> Tensor:
    return y.abs() * _column(stats[3]) + _column(stats[4])


def _activated(size: Tensor, act: str) -> Tensor:
    """What stands behind act(v), for a v with terms of `size`.

    By the mean value theorem a rounding e of v moves act(v) by at most slope*e, and |act(v)| is
    at most |act(0)| + slope*|v|.
    """
    origin = reference.activate(torch.zeros((), dtype=size.dtype, device=size.device), act)
    return origin.abs() + activation(act).slope * size


def _derived(gate: Gate, branches: Any) -> Tensor | float:
    """What stands behind the factor act'(v) that a gate applies; 1 where it is 0 or 1.

    It is at most slope, and by the mean value theorem a rounding e of v moves it by at most
    curvature*e.
    """
    formulas = activation(gate.act)
    if gate.kind == "none" or formulas.gate is not None:
        return 1.0
    return formulas.slope + formulas.curvature * _affine(branches[0].y, branches[0].stats)


def _of_stats(y: Tensor, state: Tensor | None = None, prior_count: int = 0) -> dict[str, Tensor]:
    """The mean's own rounding error e enters M2 as M*e^2, and as M*e*delta in a merge."""
    mean, m2 = reference.channel_stats(y, state, prior_count)
    size = y.abs().mean((0, 2, 3))
    delta = torch.zeros_like(mean) if state is None else (mean - state[0]).abs()
    total = prior_count + y.numel() // max(y.shape[1], 1)
    eps = torch.finfo(torch.float32).eps
    return {"mean": size, "M2": m2 + total * size * (delta + eps * size)}


def _of_finalize(
    state: Tensor | None, count: int, running: Any, weight: Tensor | None, bias: Tensor | None,
    eps: float, *, acc: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    stats = reference.finalize_stats(state, count, running, weight, bias, eps)
    shift = (stats[0] * stats[3]).abs()
    return {"shift": shift if bias is None else shift + bias.abs()}


def _of_scale_shift_act(y: Tensor, stats: Tensor, **more: Any) -> dict[str, Tensor]:
    size = _affine(y, stats)
    residual, other = more.get("residual"), more.get("residual_stats")
    if residual is not None:
        size = size + (residual.abs() if other is None else _affine(residual, other))
    return {"out": _activated(size, more.get("act", "none"))}


def _of_pooled(y: Tensor, stats: Tensor, *, pool: MaxPool, **more: Any) -> dict[str, Tensor]:
    return {"out": pool.apply(_activated(_affine(y, stats), more.get("act", "none")))}


def _of_pool_backward(
    grad_out: Tensor, argmax: Tensor, pool: MaxPool, size: tuple[int, int]
) -> dict[str, Tensor]:
    last = is_channels_last(grad_out)
    grad = reference.max_pool_backward(grad_out.abs(), argmax, pool, size, channels_last=last)
    return {"grad": grad}


def _of_add(x: Tensor, residual: Tensor, **_: Any) -> dict[str, Tensor]:
    return {"out": x.abs() + residual.abs()}


def _of_reduce(
    grad_out: Tensor, gate: Gate, branches: Any, *, sums: Tensor | None = None
) -> dict[str, Tensor]:
    factor = _derived(gate, branches)
    if isinstance(factor, Tensor):
        g = grad_out.abs() * factor
    else:
        last = is_channels_last(grad_out)
        g = reference.gated(grad_out, gate, branches, channels_last=last).abs()
    sizes = {"sum_g": g.sum((0, 2, 3))}
    for row, branch in enumerate(branches, start=1):
        size = (branch.y - branch.stats[0].view(1, -1, 1, 1)).abs()
        sizes[f"sum_gx{row}"] = (g * size).sum((0, 2, 3)) * branch.stats[2]
    if sums is not None:
        sizes = {k: v + sums[row].abs() for row, (k, v) in enumerate(sizes.items())}
    return sizes


def _of_apply(
    grad_out: Tensor, gate: Gate, branches: Any, sums: Tensor, count: int, **_: Any
) -> dict[str, Tensor]:
    sizes = {}
    for row, branch in enumerate(branches, start=1):
        mean, _, invstd, scale, _ = branch.stats.abs()
        size = grad_out.abs() * _derived(gate, branches) * _column(scale)
        if count:
            b = scale * invstd * sums[row].abs() / count
            c = scale * sums[0].abs() / count + b * mean
            size = size + branch.y.abs() * _column(b) + _column(c)
        sizes[f"grad_y{row}"] = size
    return sizes


def _input(x: Tensor, prologue: Prologue | None) -> Tensor:
    return x.abs() if prologue is None else _activated(_affine(x, prologue.stats), prologue.act)


def _of_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv,
    *, prologue: Prologue | None = None, **_: Any,
) -> dict[str, Tensor]:  # fmt: skip
    b = None if bias is None else bias.abs()
    return {"y": reference.conv_forward(_input(x, prologue), weight.abs(), b, conv)[0]}


def _of_forward(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, **more: Any
) -> dict[str, Tensor]:
    """A relative error e of var + eps is one of e/2 in invstd and scale; shift has the mean's as
    well.
    """
    count = y.numel() // max(y.shape[1], 1)
    state, of_state = reference.channel_stats(y), _of_stats(y)
    stats = reference.finalize_stats(state, count, None, weight, bias, eps)
    _, var, invstd, scale, _ = stats.abs()
    var_size = of_state["M2"] / count
    factor = 1 + var_size / (var + eps) / 2
    shift = of_state["mean"] * scale * factor + (0 if bias is None else bias.abs())
    sizes = {"mean": of_state["mean"], "var": var_size, "invstd": invstd * factor}
    sizes |= {"scale": scale * factor, "shift": shift}
    grown = torch.stack([*stats[:3], scale * factor, shift])
    return sizes | _of_scale_shift_act(y, grown, **more)


def _of_backward(
    grad_out: Tensor, gate: Gate, branches: Any, count: int, **_: Any
) -> dict[str, Tensor]:
    last = is_channels_last(grad_out)
    sums = reference.bn_act_backward_reduce(grad_out, gate, branches, channels_last=last)
    sizes = _of_apply(grad_out, gate, branches, sums, count)
    return sizes | _of_reduce(grad_out, gate, branches)


def _of_data(
    grad_y: Tensor, weight: Tensor, like: Tensor, conv: Conv,
    *, accumulate: Tensor | None = None, **_: Any,
) -> dict[str, Tensor]:  # fmt: skip
    more = None if accumulate is None else accumulate.abs()
    size = reference.conv_backward_data(grad_y.abs(), weight.abs(), like, conv, accumulate=more)
    return {"grad_x": size}


def _of_weight(
    grad_y: Tensor, x: Tensor, weight: Tensor, conv: Conv,
    *, prologue: Prologue | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    z = _input(x, prologue)
    return {"grad_weight": reference.conv_backward_weight(grad_y.abs(), z, weight, conv)}


def _of_inference(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, stats: Tensor,
    *, residual: Tensor | None = None, act: str = "none",
) -> dict[str, Tensor]:  # fmt: skip
    size = _affine(_of_conv(x, weight, bias, conv)["y"], stats)
    return {"out": _activated(size if residual is None else size + residual.abs(), act)}


def _of_unit(
    grad: PendingGrad, x: Tensor, weight: Tensor, conv: Conv,
    *, prologue: Prologue | None, accumulate: Any, reduce: Any, **_: Any,
) -> dict[str, Tensor]:  # fmt: skip
    size = _of_apply(grad.grad_out, grad.gate, (grad.branch,), grad.sums, grad.values)["grad_y1"]
    if isinstance(accumulate, Gated):
        accumulate = accumulate.grad_out
    sizes = _of_weight(size, x, weight, conv, prologue=prologue)
    sizes |= _of_data(size, weight, x, conv, accumulate=accumulate)
    if reduce is not None:
        gate, branch = reduce
        g = sizes["grad_x"] * _derived(gate, (branch,))
        sizes |= _of_reduce(g, Gate("none"), (branch,))
    return sizes


_MAGNITUDES: dict[str, Any] = {
    "channel_stats": _of_stats,
    "finalize_stats": _of_finalize,
    "scale_shift_act": _of_scale_shift_act,
    "scale_shift_act_pool": _of_pooled,
    "max_pool_backward": _of_pool_backward,
    "add_act": _of_add,
    "bn_act_backward_reduce": _of_reduce,
    "bn_act_backward_apply": _of_apply,
    "bn_act_forward": _of_forward,
    "bn_act_backward": _of_backward,
    "conv_forward": _of_conv,
    "conv_backward_data": _of_data,
    "conv_backward_weight": _of_weight,
    "conv_bn_act": _of_inference,
    "conv_backward": _of_unit,
}
