"""The suite is itself tested: every planted fault must turn the parity checks red.

A fault replaces one implementation, or one function of the engine, by a version with a mistake
that somebody made once. If a check stays green under one of them, the check is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.block import backward, make_plan, use_backend
from fastres.block.backward import _Backward
from fastres.block.running import Updates
from fastres.kernels import (
    Branch,
    Gate,
    Implementation,
    RunningUpdate,
    implementations,
    registry,
)
from fastres.testing import CASES, BlockCase, FunctionalBlock, check_block, check_implementation

Run = Callable[..., Any]
Fault = Callable[[Run], Run]


# ---------------------------------------------------------------- faults of a primitive


def _eps_dropped(run: Run) -> Run:
    return lambda state, count, running, w, b, eps, **k: run(state, count, running, w, b, 0.0, **k)


def _invstd_of_the_unbiased_variance(run: Run) -> Run:
    return lambda state, count, *a, **k: run(state, count if state is None else count - 1, *a, **k)


def _norm_bias_dropped(run: Run) -> Run:
    return lambda state, count, running, w, b, eps, **k: run(
        state, count, running, w, None, eps, **k
    )


def _shift_without_mean(run: Run) -> Run:
    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        stats = run(*args, **kwargs)
        stats[4] += stats[0] * stats[3]
        return stats

    return wrong


def _sum_of_squares(run: Run) -> Run:
    """E[x^2] - E[x]^2 in float32."""

    def wrong(y: Tensor, state: Tensor | None = None, prior_count: int = 0) -> Tensor:
        if state is not None or y.numel() == 0:
            return run(y, state, prior_count)
        count, v = y.numel() // y.shape[1], y.float()
        mean = v.mean((0, 2, 3))
        return torch.stack([mean, (v.square().mean((0, 2, 3)) - mean.square()) * count])

    return wrong


def _count_off_by_one(run: Run) -> Run:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        args = (*args[:4], args[4] + 1) if args[4] else args
        return run(*args, **kwargs)

    return wrong


def _mean_not_subtracted(run: Run) -> Run:
    def wrong(grad_out: Tensor, gate: Gate, branches: Any, **kwargs: Any) -> Tensor:
        raw = [_without_mean(b) for b in branches] if gate.kind != "affine" else branches
        return run(grad_out, gate, raw, **kwargs)

    return wrong


def _without_mean(branch: Branch) -> Branch:
    stats = branch.stats.clone()
    stats[0] = 0
    return branch._replace(stats=stats)


def _sums_swapped(run: Run) -> Run:
    """grad_weight and grad_bias swapped."""

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return run(*args, **kwargs)[[1, 0, 2]]

    return wrong


def _gate_ignored(run: Run) -> Run:
    return lambda grad, gate, *a, **k: run(grad, Gate("none", None, "none"), *a, **k)


def _gate_inverted(run: Run) -> Run:
    def wrong(grad: Tensor, gate: Gate, *args: Any, **kwargs: Any) -> Any:
        if gate.kind == "mask" and gate.tensor is not None:
            gate = gate._replace(tensor=~gate.tensor)
        return run(grad, gate, *args, **kwargs)

    return wrong


def _activation_forgotten(run: Run) -> Run:
    return lambda *a, **k: run(*a, **{**k, "act": "none"})


def _nan_stopped(run: Run) -> Run:
    """fmaxf's ReLU: max(0, NaN) is 0."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, mask = run(*args, **kwargs)
        return (
            (torch.nan_to_num_(out, nan=0.0), mask) if kwargs.get("act") == "relu" else (out, mask)
        )

    return wrong


def _residual_forgotten(run: Run) -> Run:
    return lambda *a, **k: run(*a, **{**k, "residual": None})


def _residual_scale_forgotten(run: Run) -> Run:
    return lambda *a, **k: run(*a, **{**k, "residual_stats": None})


def _mask_of_the_first_row(run: Run) -> Run:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, mask = run(*args, **kwargs)
        return out, (
            mask if mask is None or not len(mask) else mask[:1].expand_as(mask).contiguous()
        )

    return wrong


def _zero_by_greater_than(run: Run) -> Run:
    """A mask of out > 0 closes the gate at NaN."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, mask = run(*args, **kwargs)
        if mask is not None:
            from fastres.kernels import is_channels_last, reference

            mask = reference.pack_mask(out > 0, is_channels_last(args[0]))
        return out, mask

    return wrong


def _accumulate_forgotten(run: Run) -> Run:
    return lambda *a, **k: run(*a, **{**k, "accumulate": None})


def _prologue_without_activation(run: Run) -> Run:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        prologue = kwargs.get("prologue")
        if prologue is not None:
            kwargs["prologue"] = prologue._replace(act="none")
        return run(*args, **kwargs)

    return wrong


def _prologue_forgotten(run: Run) -> Run:
    return lambda *a, **k: run(*a, **{**k, "prologue": None})


def _convolution_bias_forgotten(run: Run) -> Run:
    return lambda x, w, bias, *a, **k: run(x, w, None, *a, **k)


def _statistics_rounded(run: Run) -> Run:
    """Statistics that went through bfloat16."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        y, state = run(*args, **kwargs)
        return y, (None if state is None else state * (1 + 2**-8))

    return wrong


def _one_element_wrong(run: Run) -> Run:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        target = result if isinstance(result, Tensor) else result[0]
        if target.numel():
            target[(-1,) * target.dim()] += 2**-6
        return result

    return wrong


def _layout_lost(run: Run) -> Run:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        return (
            result.contiguous()
            if isinstance(result, Tensor)
            else (result[0].contiguous(), *result[1:])
        )

    return wrong


def _input_overwritten(run: Run) -> Run:
    def wrong(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = run(x, *args, **kwargs)
        x.mul_(2)
        return result

    return wrong


def _low_precision_sums(run: Run) -> Run:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = run(*args, **kwargs)
        return found.to(torch.bfloat16).to(found.dtype)

    return wrong


_PRIMITIVE_FAULTS: list[tuple[str, Fault]] = [
    ("finalize_stats", _eps_dropped),
    ("finalize_stats", _invstd_of_the_unbiased_variance),
    ("finalize_stats", _norm_bias_dropped),
    ("finalize_stats", _shift_without_mean),
    ("channel_stats", _sum_of_squares),
    ("channel_stats", _low_precision_sums),
    ("bn_act_backward_apply", _count_off_by_one),
    ("bn_act_backward_apply", _gate_ignored),
    ("bn_act_backward_apply", _gate_inverted),
    ("bn_act_backward_reduce", _mean_not_subtracted),
    ("bn_act_backward_reduce", _sums_swapped),
    ("bn_act_backward_reduce", _gate_ignored),
    ("bn_act_backward_reduce", _gate_inverted),
    ("bn_act_backward_reduce", _low_precision_sums),
    ("scale_shift_act", _activation_forgotten),
    ("scale_shift_act", _nan_stopped),
    ("scale_shift_act", _residual_forgotten),
    ("scale_shift_act", _residual_scale_forgotten),
    ("scale_shift_act", _mask_of_the_first_row),
    ("scale_shift_act", _zero_by_greater_than),
    ("scale_shift_act", _one_element_wrong),
    ("scale_shift_act", _layout_lost),
    ("scale_shift_act", _input_overwritten),
    ("add_act", _activation_forgotten),
    ("add_act", _mask_of_the_first_row),
    ("act_backward", _gate_ignored),
    ("act_backward", _gate_inverted),
    ("conv_backward_data", _accumulate_forgotten),
    ("conv_backward_data", _one_element_wrong),
    ("conv_backward_weight", _prologue_forgotten),
    ("conv_backward_weight", _prologue_without_activation),
    ("conv_backward_weight", _one_element_wrong),
    ("conv_forward", _prologue_without_activation),
    ("conv_forward", _convolution_bias_forgotten),
    ("conv_forward", _statistics_rounded),
    ("conv_bn_act", _residual_forgotten),
    ("conv_bn_act", _activation_forgotten),
]


def _fault_name(value: object) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", "").strip("_")


@pytest.mark.parametrize(("primitive", "fault"), _PRIMITIVE_FAULTS, ids=_fault_name)
def test_fault_in_a_primitive_is_found(primitive: str, fault: Fault) -> None:
    (entry,) = implementations(primitive, "reference")
    broken: Implementation = replace(entry, run=fault(entry.run))
    caught = 0
    for case in CASES:
        try:
            check_implementation(broken, case)
        except AssertionError:
            caught += 1
    assert caught, f"{fault.__name__} in {primitive} passes every case"


# ---------------------------------------------------------------- faults of the engine


_IDENTITY = BlockCase("planted")
_PROJECTION = BlockCase("planted, projection", shortcut="projection", stride=2)
_POOLED = BlockCase("planted, pooled", shortcut="pooled", stride=2, shape=(4, 16, 7, 6))
_EVAL = BlockCase("planted, eval", training=False, conv_bias=True, shortcut="projection")


@dataclass(frozen=True)
class Planted:
    """A fault in the engine: what is replaced, by what, and a case in which it acts."""

    name: str
    owner: Any
    attribute: str
    make: Callable[[Any], Any]
    case: BlockCase = _IDENTITY

    def __str__(self) -> str:
        return self.name


def _changed(change: Callable[[RunningUpdate], RunningUpdate]) -> Callable[[Any], Any]:
    return lambda real: lambda self, stats: [change(u) for u in real(self, stats)]


#: As if the batch variance were not multiplied by M/(M-1).
_biased_running_var = _changed(lambda u: u._replace(count=1 << 40))
_momentum_inverted = _changed(lambda u: u._replace(momentum=1 - u.momentum))


def _other_row(real: Any) -> Any:
    def sum_(self: _Backward, index: int, row: int | None) -> Tensor:
        return real(self, index, 0 if row is None else None)

    return sum_


_ENGINE_FAULTS = [
    Planted("residual gradient forgotten", _Backward, "_residual_gradient",
            lambda f: lambda s: None),
    Planted("shortcut gradient forgotten", _Backward, "_residual_gradient",
            lambda f: lambda s: None, _PROJECTION),
    Planted("grad_weight and grad_bias swapped", _Backward, "_sum", _other_row),
    Planted("projection takes the main branch's sums", backward, "_own_sums",
            lambda f: lambda sums, branch: sums, _PROJECTION),
    Planted("end gate left open", _Backward, "_end_gate", lambda f: lambda s: Gate("none")),
    Planted("inner gate left open", _Backward, "_inner_gate", lambda f: lambda s, i: Gate("none")),
    Planted("count dropped", _Backward, "_count", lambda f: lambda s, i: 0),
    Planted("count off by one", _Backward, "_count", lambda f: lambda s, i: f(s, i) + 1),
    Planted("count in eval", _Backward, "_count", lambda f: lambda s, i: 120, _EVAL),
    Planted("running_var biased", Updates, "after", _biased_running_var),
    Planted("momentum inverted", Updates, "after", _momentum_inverted),
    Planted("running statistics not updated", Updates, "after", lambda f: lambda *a: []),
    Planted("pooling's gradient not scaled", backward, "_unpool",
            lambda f: lambda spec, g, x: 4 * f(spec, g, x), _POOLED),
    Planted("bias gradient in eval unscaled", _Backward, "_bias_gradient",
            lambda f: lambda s, i: s._sum(i, 0), _EVAL),
]  # fmt: skip


@pytest.fixture
def _fresh_plans() -> Iterator[None]:
    make_plan.cache_clear()
    yield
    make_plan.cache_clear()


def _check(case: BlockCase) -> None:
    stock = case.stock()
    with use_backend("aten"):
        check_block(stock, FunctionalBlock.of(stock), case.input().requires_grad_(), what=str(case))


@pytest.mark.parametrize("planted", _ENGINE_FAULTS, ids=str)
def test_fault_in_the_engine_is_found(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(planted.case)
    real = getattr(planted.owner, planted.attribute)
    monkeypatch.setattr(planted.owner, planted.attribute, planted.make(real))
    with pytest.raises(AssertionError):
        _check(planted.case)


@pytest.mark.usefixtures("_fresh_plans")
@pytest.mark.parametrize(("primitive", "fault"), [
    ("finalize_stats", _eps_dropped),
    ("finalize_stats", _invstd_of_the_unbiased_variance),
    ("bn_act_backward_reduce", _sums_swapped),
    ("bn_act_backward_reduce", _mean_not_subtracted),
    ("bn_act_backward_apply", _count_off_by_one),
    ("bn_act_backward_apply", _gate_ignored),
    ("conv_backward_data", _accumulate_forgotten),
    ("scale_shift_act", _residual_forgotten),
    ("scale_shift_act", _mask_of_the_first_row),
], ids=_fault_name)  # fmt: skip
def test_fault_in_a_primitive_shows_in_the_block(
    primitive: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BlockCase("planted, block")
    _check(case)
    table = {key: list(entries) for key, entries in registry._TABLE.items()}
    table[primitive, "aten"] = [replace(e, run=fault(e.run)) for e in table[primitive, "aten"]]
    monkeypatch.setattr(registry, "_TABLE", table)
    make_plan.cache_clear()
    with pytest.raises(AssertionError):
        _check(case)
