"""Holds an implementation of a primitive to its definition, on a case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import (
    IN_PLACE,
    STATS_ROWS,
    Implementation,
    acc_dtype,
    activation,
    is_channels_last,
    reference,
)
from fastres.testing.builder import Call
from fastres.testing.calls import calls
from fastres.testing.cases import Case
from fastres.testing.compare import assert_parity, assert_same_bits
from fastres.testing.formulas import TRUTH, Formulas, magnitudes, torch_formulas

#: Results that are sums over a whole channel; a backend may hand them over in float64.
_SUMS = ("mean", "M2", "sum_g", "sum_gx1", "sum_gx2")

#: Results that divide or take a root: no input makes them exact.
_ROUNDED = ("M2", *STATS_ROWS)

#: Where in a result the mask is.
_MASKS = {"scale_shift_act": 1, "add_act": 1, "bn_act_forward": 2}

#: Results that are activations, in the layout of the call.
_ACTIVATIONS = ("out", "y", "grad_x", "grad_y1", "grad_y2", "grad_residual", "grad")


@dataclass
class Outcome:
    """What a check did: the variants that ran, and why the others were declined."""

    ran: list[str] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)


def check_implementation(
    implementation: Implementation, case: Case, *, device: str = "cpu"
) -> Outcome:
    """Run an implementation on every call that a case stands for, and compare.

    Checked are values (2x rule, or bits where the case is exact), masks and their padding,
    layouts, the statistics of what was stored, that inputs stay untouched, and aliased outputs.

    Args:
        implementation: one of `fastres.kernels.implementations()`, or one's own.
        case: one of `fastres.testing.CASES`, or one's own.
        device: torch device on which to run.

    Returns:
        What ran, and what the implementation's own predicate declined.

    Raises:
        AssertionError: naming implementation, case, variant, quantity and worst channel.
    """
    outcome = Outcome()
    for call in calls(implementation.primitive, case, implementation.backend, device):
        reason = implementation.why_not(call.request)
        if reason is not None:
            outcome.declined[call.label] = reason
            continue
        where = f"{implementation} {implementation.primitive} on {case}, {call.label}"
        _check_call(implementation, case, call, where)
        outcome.ran.append(call.label)
    return outcome


def _check_call(implementation: Implementation, case: Case, call: Call, where: str) -> None:
    primitive = implementation.primitive
    args, kwargs = _map(torch.clone, call.args), _map(torch.clone, call.kwargs)
    if call.in_place is not None:
        kwargs["out"] = args[call.in_place]
    result = implementation.run(*args, **kwargs)
    if primitive in IN_PLACE:
        _check_in_place(call, args, where)
        return
    _check_untouched(call, args, where)
    exact_args, exact_kwargs = _map(_upcast, call.args), _map(_upcast, call.kwargs)
    truth = named(primitive, TRUTH.run(primitive, *exact_args, **exact_kwargs))
    torchs = torch_formulas(case.dtype).run(primitive, *call.args, **call.kwargs)
    baseline = named(primitive, torchs)
    sizes = magnitudes(primitive, exact_args, exact_kwargs)
    results = named(primitive, result)
    if primitive in ("bn_act_backward_reduce", "bn_act_backward"):
        # Without a second branch the third row is nobody's.
        results = {k: v for k, v in results.items() if k != "sum_gx2" or k in sizes}
    elif results.keys() != truth.keys():
        raise AssertionError(f"{where}: must return {list(truth)}, got {list(results)}")
    _check_stored(primitive, call, results, truth, result, where)
    if "mean" in results and "y" in results:
        sizes |= magnitudes("channel_stats", (_upcast(results["y"]),), {})
    if case.exact and "M2" in sizes:
        # Torch happens to add small integers' squares without an error that one could double; a
        # tree over `count` terms rounds once per level.
        sizes["M2"] = sizes["M2"] * max(1.0, math.log2(max(case.count, 1)))
    exact = case.exact and not (primitive == "conv_backward" and case.dtype != torch.float32)
    for name, value in results.items():
        if name in _ACTIVATIONS:
            _check_layout(value, case, f"{where}: {name}")
        if name == "argmax" and not exact:
            # Another tap may do where a rounding decides: what counts is the value there.
            value = _at_taps(value, exact_args, exact_kwargs).to(case.dtype)
            _compare(name, value, truth["out"], baseline["out"], sizes["out"], case, where)
            continue
        if exact and name not in _ROUNDED:
            expected = truth[name].to(value.dtype)
            assert_same_bits(value, expected, what=f"{where}: {name}", signed_zeros=False)
        else:
            _compare(name, value, truth[name], baseline[name], sizes.get(name), case, where)


def _at_taps(argmax: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What is pooled, at the taps that an argmax names."""
    y, stats = args
    last = is_channels_last(y)
    z, _ = reference.scale_shift_act(y, stats, act=kwargs["act"], channels_last=last)
    places = reference.indices_of(argmax, kwargs["pool"], y.shape[3])
    return z.flatten(2).gather(2, places.flatten(2)).view(argmax.shape)


def _check_in_place(call: Call, args: tuple[Any, ...], where: str) -> None:
    """Running statistics and counters after an update; the statistics of the batch stay."""
    truth = _map(_upcast, _map(torch.clone, call.args))
    TRUTH.run("update_running", *truth)
    baseline = _map(torch.clone, call.args)
    acc = call.request.dtype
    Formulas(acc, acc).run("update_running", *baseline)
    for i, before in enumerate(call.args[0]):
        assert_same_bits(args[0][i].stats, before.stats, what=f"{where}: stats {i} after the call")
        for name in ("running_mean", "running_var", "counter"):
            value, expected, torchs = (getattr(u[0][i], name) for u in (args, truth, baseline))
            if name == "counter" and value is not None:
                assert_same_bits(value, expected, what=f"{where}: counter {i}")
            elif value is not None:
                size = getattr(before, name).abs() + expected.abs()  # of what is added up
                assert_parity(
                    value, expected, [torchs], what=f"{where}: {name} {i}", magnitude=size
                )


def named(primitive: str, result: Any) -> dict[str, Tensor]:
    """A primitive's results by name, without masks and without what was not asked for."""
    results: dict[str, Tensor | None] = _NAMES[primitive](result)
    return {name: t for name, t in results.items() if t is not None}


def _state(state: Tensor | None) -> dict[str, Tensor | None]:
    return {} if state is None else {"mean": state[0], "M2": state[1]}


def _sums(sums: Tensor | None, rows: int = 3) -> dict[str, Tensor | None]:
    names = ("sum_g", "sum_gx1", "sum_gx2")[:rows]
    return {} if sums is None else {n: sums[i] for i, n in enumerate(names)}


def _applied(result: Any) -> dict[str, Tensor | None]:
    grads, residual = result
    named_grads = {f"grad_y{row}": g for row, g in enumerate(grads, start=1)}
    return {**named_grads, "grad_residual": residual}


def _unit(result: Any) -> dict[str, Tensor | None]:
    grad_x, grad_weight, sums = result
    return {"grad_x": grad_x, "grad_weight": grad_weight, **_sums(sums, 2)}


_NAMES: dict[str, Callable[[Any], dict[str, Tensor | None]]] = {
    "channel_stats": _state,
    "finalize_stats": lambda s: dict(zip(STATS_ROWS, s, strict=True)),
    "scale_shift_act": lambda r: {"out": r[0]},
    "bn_act_backward_reduce": _sums,
    "bn_act_backward_apply": _applied,
    "bn_act_forward": lambda r: {**dict(zip(STATS_ROWS, r[0], strict=True)), "out": r[1]},
    "bn_act_backward": lambda r: {**_sums(r[0]), **_applied(r[1:])},
    "add_act": lambda r: {"out": r[0]},
    "act_backward": lambda r: {"grad": r},
    "scale_shift_act_pool": lambda r: {"out": r[0], "argmax": r[1]},
    "max_pool_backward": lambda r: {"grad": r},
    "conv_forward": lambda r: {"y": r[0], **_state(r[1])},
    "conv_backward_data": lambda r: {"grad_x": r},
    "conv_backward_weight": lambda r: {"grad_weight": r},
    "conv_bn_act": lambda r: {"out": r},
    "conv_backward": _unit,
}


# ---------------------------------------------------------------- parts


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with the function applied to every tensor inside."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: _map(function, v) for k, v in value.items()}
    if isinstance(value, tuple):
        parts = [_map(function, v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _upcast(t: Tensor) -> Tensor:
    return t.to(torch.float64) if t.is_floating_point() else t


def _leaves(value: Any) -> list[Tensor]:
    leaves: list[Tensor] = []

    def collect(t: Tensor) -> Tensor:
        leaves.append(t)
        return t

    _map(collect, value)
    return leaves


def _check_untouched(call: Call, args: tuple[Any, ...], where: str) -> None:
    for i, (before, after) in enumerate(zip(call.args, args, strict=True)):
        if i == call.in_place:
            continue
        for a, b in zip(_leaves(before), _leaves(after), strict=True):
            assert_same_bits(b, a, what=f"{where}: argument {i} after the call")


def _check_stored(
    primitive: str, call: Call, results: dict[str, Tensor], truth: dict[str, Tensor], result: Any,
    where: str,
) -> None:  # fmt: skip
    """What is said about a stored tensor is held to that tensor: its mask, its statistics."""
    mask = result[_MASKS[primitive]] if primitive in _MASKS else None
    if mask is not None:
        gate = activation(call.request.act).gate
        assert gate is not None, "a call with a mask is of an activation with a gate"
        expected = reference.pack_mask(gate(results["out"]), is_channels_last(call.args[0]))
        assert_same_bits(mask, expected, what=f"{where}: mask")
    if primitive == "add_act":
        zero = (truth["out"] == 0) & (results["out"] == 0)
        if not bool((torch.signbit(results["out"]) == torch.signbit(truth["out"]))[zero].all()):
            raise AssertionError(f"{where}: signs of zero must be torch's")
    if primitive == "conv_forward" and "mean" in results:
        truth |= _state(reference.channel_stats(results["y"].to(torch.float64)))  # type: ignore[arg-type]


def _check_layout(value: Tensor, case: Case, what: str) -> None:
    if value.numel() == 0:
        return
    fmt = torch.channels_last if case.channels_last else torch.contiguous_format
    if value.dtype != case.dtype or not value.is_contiguous(memory_format=fmt):
        raise AssertionError(
            f"{what} must be {case.dtype}, dense in {fmt}, got {value.dtype} "
            f"with strides {value.stride()}"
        )


def _compare(
    name: str, value: Tensor, truth: Tensor, baseline: Tensor, size: Tensor | None, case: Case,
    where: str,
) -> None:  # fmt: skip
    baselines = [baseline]
    if name == "mean":
        # The mean of a channel with an infinity is NaN by Welford and infinite by a sum; torch
        # does both, its var_mean the one and its mean the other.
        baselines.append(torch.where(truth.isnan() & value.isinf(), value, baseline))
    # State and sums are formed in the accumulation dtype, in whichever they are handed over.
    precision = acc_dtype(case.dtype) if name in _SUMS else value.dtype
    dim = 0 if name == "grad_weight" else 1
    assert_parity(
        value, truth, baselines, what=f"{where}: {name}", channel_dim=dim, magnitude=size,
        precision=precision,
    )  # fmt: skip
