"""Whole residual blocks by the cuda backend, held to torch's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from backend_checks import (
    check_far_offsets,
    check_float64_is_refused,
    check_graph_capture,
    needs_gpu,
)

import fastres
from fastres.block import Block, backward, compose, make_plan
from fastres.block.backward import _Backward
from fastres.block.plan import Context, Plan
from fastres.kernels import Gated
from fastres.kernels.cuda import channel_block
from fastres.testing import BLOCK_CASES, BlockCase, FunctionalBlock, check_block

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_poison")]


def _check(case: BlockCase, device: str, what: str = "") -> None:
    stock = case.stock(device)
    x = case.input(device=device).requires_grad_()
    with fastres.use_backend("cuda"):
        check_block(stock, FunctionalBlock.of(stock), x, what=f"{what} {case}")


@pytest.mark.grid(5)
@pytest.mark.parametrize("mode", ["speed", "balanced", "lean"])
@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
def test_block_is_the_stock_block(case: BlockCase, mode: str, device: str) -> None:
    with fastres.use_memory(mode):
        _check(case, device, mode)


@pytest.mark.parametrize("case", BLOCK_CASES[::2], ids=str)
def test_block_in_inference_is_the_stock_block(case: BlockCase, device: str) -> None:
    stock = replace(case, training=False).stock(device)
    with fastres.use_backend("cuda"), torch.no_grad():
        check_block(stock, FunctionalBlock.of(stock), case.input(device=device), what=str(case))


@pytest.mark.parametrize("case", BLOCK_CASES[::3], ids=str)
def test_in_channel_blocks_it_is_the_stock_block(case: BlockCase, device: str, monkeypatch) -> None:
    possible = channel_block.variants
    # Channel blocks come after the passes: the last variant is the narrowest of them.
    monkeypatch.setattr(channel_block, "variants", lambda *args: possible(*args)[-1:])
    _check(case, device, "channel blocks")


# ---------------------------------------------------------------- who does what


def _plan(device: str, channels_last: bool = True) -> Plan:
    module = FunctionalBlock.of(BlockCase("plan").stock(device))
    acts = enumerate(("relu", "relu", "none"))
    units = tuple(module.layer(i)._replace(act=act).layer.unit for i, act in acts)
    spec = Block(units, "input", act="relu", backend="cuda")
    weights = tuple((*module.convs[i].weight.shape,) for i in range(3))
    # Not float32, which a GPU's torch rounds differently in products and convolutions.
    return make_plan(spec, Context(device, torch.bfloat16, channels_last, weights))


def test_plan(device: str) -> None:
    plan = _plan(device)
    assert plan.level == "b"
    assert {entry.backend for entry in plan.pointwise.values()} == {"cuda"}
    assert plan.whole("bn_act_forward", "relu") is channel_block.bn_act_forward
    data = [str(conv.data) for conv in plan.convs if conv is not None]
    assert data == ["cuda:addmm", "aten:convolution_backward", "cuda:addmm"]
    assert all(conv is not None and conv.forward.backend == "aten" for conv in plan.convs)
    assert {str(conv.infer) for conv in plan.convs if conv} == {"cuda:convolution, one pass"}
    data = [str(conv.data) for conv in _plan(device, False).convs if conv is not None]
    assert set(data) == {"aten:convolution_backward"}


def test_batch_norm_is_one_call_each_way(device: str, monkeypatch) -> None:
    """Statistics and normalisation forward; sums, gradients and the residual's backward."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        real = getattr(channel_block, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(name + (", residual" if kwargs.get("want_residual") else ""))
            return real(*args, **kwargs)

        return run

    plan_whole = Plan.whole
    made = {name: counted(name) for name in ("bn_act_forward", "bn_act_backward")}
    monkeypatch.setattr(Plan, "whole", lambda s, p, act: plan_whole(s, p, act) and made[p])
    monkeypatch.setattr(Plan, "run", _refusing(Plan.run, "channel_stats", "act_backward"))
    _check(BlockCase("calls"), device)
    assert calls[:3] == ["bn_act_forward"] * 3
    assert calls[3:6] == ["bn_act_backward, residual", "bn_act_backward", "bn_act_backward"]


def _refusing(real: Any, *primitives: str) -> Any:
    def run(self: Plan, primitive: str, act: str = "none") -> Any:
        assert primitive not in primitives, f"{primitive} was asked for"
        return real(self, primitive, act)

    return run


def test_float64_is_an_error_with_its_reason(device: str) -> None:
    check_float64_is_refused("cuda", device)


# ---------------------------------------------------------------- planted faults


def _no_residual(real: Any) -> Any:
    def formed(self: _Backward, grad_out: Any, gate: Any, branches: Any) -> Any:
        found = real(self, grad_out, gate, branches)
        self.end = Gated(torch.zeros_like(grad_out), gate)
        return found

    return formed


_FAULTS = [
    ("residual gradient forgotten", _Backward, "_formed_end", _no_residual, "identity"),
    ("projection takes the main branch's sums", backward, "_own_sums",
     lambda real: lambda sums, branch: sums, "projection"),
    ("what is added to is overwritten while others read it", compose, "_formed_residual",
     lambda real: lambda plan, given: (getattr(given, "grad_out", given), True), "identity"),
]  # fmt: skip


@pytest.fixture
def _fresh_plans() -> Iterator[None]:
    make_plan.cache_clear()
    yield
    make_plan.cache_clear()


@pytest.mark.usefixtures("_fresh_plans")
@pytest.mark.parametrize("planted", _FAULTS, ids=lambda planted: planted[0])
def test_fault_is_found(planted: tuple[Any, ...], device: str, monkeypatch) -> None:
    _, owner, attribute, make, shortcut = planted
    mode = "lean" if owner is compose else "speed"
    case = BlockCase("fault", shortcut=shortcut)
    with fastres.use_memory(mode):
        _check(case, device)
        monkeypatch.setattr(owner, attribute, make(getattr(owner, attribute)))
        with pytest.raises(AssertionError):
            _check(case, device)


# ---------------------------------------------------------------- GPUs alone


def test_a_block_is_captured_in_a_graph(device: str) -> None:
    check_graph_capture("cuda", "auto", device)


def test_work_follows_the_current_stream(device: str) -> None:
    """What is computed on a side stream is ordered behind that stream's work."""
    needs_gpu(device)
    y = torch.zeros(64, 256, 28, 28, device=device).to(memory_format=torch.channels_last)
    stats = torch.ones(5, 256, device=device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), fastres.use_backend("cuda"):
        torch.cuda._sleep(50_000_000)
        y.fill_(3.0)
        plan = _plan(device)
        out, _ = plan.run("scale_shift_act", "relu")(y, stats, act="relu")
    stream.synchronize()
    assert (out == 4).all()


def test_offsets_past_2_to_the_31(device: str) -> None:
    check_far_offsets("cuda", device)
