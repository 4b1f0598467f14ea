"""Who counts, records or rewrites torch's operators sees those of a block as without fastres."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import CLASSIC, KINDS, RANDOM, SPARSE, Kind, kind
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastres

Pair = tuple[nn.Module, nn.Module]
CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


def run(module: nn.Module, x: Tensor, wanting: set[str]) -> Tensor:
    """A training step in which some parameters, and perhaps x, want a gradient."""
    for name, p in module.named_parameters():
        p.requires_grad_(name in wanting)
    torch.manual_seed(2)
    out: Tensor = module(x.detach().requires_grad_("x" in wanting))
    if out.requires_grad:
        out.sum().backward()
    return out


def drawn(data: st.DataObject) -> tuple[Kind, set[str]]:
    each = data.draw(st.sampled_from([*CLASSIC, *KINDS, *SPARSE, *RANDOM]), label="block")
    names = ["x", *[name for name, _ in each.pair()[0].named_parameters()]]
    return each, data.draw(st.sets(st.sampled_from(names)), label="wanting")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_flops_are_counted_as_torchs(data: st.DataObject) -> None:
    each, wanting = drawn(data)
    counts = []
    for module in each.pair(training=data.draw(st.booleans(), label="train")):
        with FlopCounterMode(display=False) as counter:
            run(module, each.input(shape=(2, 5, 4)), wanting)
        counts.append(counter.get_flop_counts()["Global"])
    assert counts[0] == counts[1]


class _Fused(TorchDispatchMode):
    """Counts by torch's formulas what really runs."""

    sees_fused_blocks = True

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.operators.add(func.name())
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_fused_operators_have_a_formula(data: st.DataObject) -> None:
    """The sum of both operators' is that of torch's, and what is computed again comes on top."""
    each, wanting = drawn(data)
    stock, fused = each.pair()
    memory = data.draw(st.sampled_from(["speed", "balanced", "lean"]), label="memory")
    fused(each.input())  # From the first call on the counter knows of them.
    with FlopCounterMode(display=False) as counter:
        run(stock, each.input(shape=(2, 5, 4)), wanting)
    with _Fused() as own, fastres.use_memory(memory):
        run(fused, each.input(shape=(2, 5, 4)), wanting)
    assert "fastres::block_forward" in own.operators
    if memory == "lean":
        assert own.total >= counter.get_total_flops()
    else:
        assert own.total == counter.get_total_flops()


@pytest.mark.parametrize("name", ["basic", "bottleneck-pooled"])
def test_flops_of_what_is_computed_again(name: str) -> None:
    """In lean memory the last convolution of a block runs twice, and so does its projection."""
    _, fused = kind(name).pair()
    x = kind(name).input()
    totals = {}
    for memory in ("balanced", "lean"):
        with _Fused() as counter, fastres.use_memory(memory):
            fused(x).sum().backward()
        totals[memory] = counter.total
    last = fused.conv3 if hasattr(fused, "conv3") else fused.conv2
    pixels = fused(x).numel() // last.out_channels
    projection = [m for m in fused.downsample or () if isinstance(m, nn.Conv2d)]
    weights = sum(m.weight.numel() for m in (last, *projection))
    assert totals["lean"] - totals["balanced"] == 2 * pixels * weights


class _Seen(TorchDispatchMode):
    """The operators that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Halving(TorchDispatchMode):
    """Rewrites what every convolution gives."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out / 2 if func is torch.ops.aten.convolution.default else out


def _wrapped(kind_of: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    if kind_of == "functional":
        from torch.nn import functional as F

        weight = torch.randn(6, 8, 3, 3)
        mean, var = torch.randn(6), torch.rand(6) + 1
        return (
            lambda x: F.relu(F.batch_norm(F.conv2d(x, weight), mean, var)),
            lambda x: fastres.functional.conv_bn_act(x, weight, mean, var),
        )
    stock, fused = kind("bottleneck").pair(training=False)
    if kind_of == "traced":
        fused = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        stock = nn.Sequential(*fused)
        assert fastres.convert(fused).fused
    return stock, fused


@pytest.mark.parametrize("kind_of", ["block", "traced", "functional"])
def test_a_mode_of_somebodys_sees_torchs_operators(kind_of: str) -> None:
    stock, fused = _wrapped(kind_of)
    x = kind("bottleneck").input().detach()
    with torch.no_grad():
        fused(x)  # What was prepared before does not run past a mode.
        for mode in (_Seen, _Halving):
            with mode() as expected:
                truth = stock(x)
            with mode() as found:
                out = fused(x)
            torch.testing.assert_close(out, truth)
            if mode is _Seen:
                assert found.names == expected.names


def test_the_reason_is_said() -> None:
    _, fused = kind("bottleneck").pair()
    assert fused.why_not() is None
    with _Seen():
        assert "_Seen, a dispatch mode" in str(fused.why_not())
    with _Seen() as seen:
        seen.sees_fused_blocks = True
        assert fused.why_not() is None


@pytest.mark.parametrize("kept", [(), CONVOLUTIONS])
def test_policies_of_selective_checkpointing_see_the_convolutions(kept: tuple[Any, ...]) -> None:
    stock, fused = kind("bottleneck-pooled").pair(torch.float64)
    results = []
    for module in (stock, fused):
        asked: list[str] = []

        def policy(ctx: Any, op: Any, *args: Any, asked: list[str] = asked, **k: Any) -> Any:
            asked.append(op.name())
            keep = op.overloadpacket in kept
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        x = kind("bottleneck-pooled").input(torch.float64)
        checkpoint(
            module, x, use_reentrant=False,
            context_fn=lambda policy=policy: create_selective_checkpoint_contexts(policy),
        ).square().sum().backward()  # fmt: skip
        assert any("convolution" in name for name in asked)
        results.append((asked, x.grad, *[p.grad for p in module.parameters()]))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1:], results[0][1:])


def test_a_compiled_graph_is_counted_as_torchs_step() -> None:
    from torch._dynamo.backends.common import aot_autograd

    totals: list[int] = []

    def counted(graph: Callable[..., Any], example: Any) -> Callable[..., Any]:
        def run_graph(*args: Any) -> Any:
            with _Fused() as counter:
                out = graph(*args)
            totals.append(counter.total)
            assert any("fastres" in name for name in counter.operators)
            return out

        return run_graph

    torch._dynamo.reset()
    # In training a graph also holds an operator of higher order, which a plain mode refuses.
    stock, fused = kind("bottleneck-pooled").pair(training=False)
    x = kind("bottleneck-pooled").input()
    compiled = torch.compile(fused, backend=aot_autograd(fw_compiler=counted), fullgraph=True)
    compiled(x).sum().backward()
    with FlopCounterMode(display=False) as counter:
        stock(x).sum().backward()
    assert len(totals) == 2 and sum(totals) == counter.get_total_flops()
    torch._dynamo.reset()


def test_a_mode_that_left_its_flag_behind_stops_no_compiler(monkeypatch: Any) -> None:
    from torch.utils import _python_dispatch

    monkeypatch.setattr(_python_dispatch, "_is_in_non_infra_torch_dispatch_mode", True)
    torch._dynamo.reset()
    stock, fused = kind("bottleneck").pair(training=False)
    x = kind("bottleneck").input().detach()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock(x))
    assert fused.why_not() is None
    torch._dynamo.reset()


def test_fakes_take_the_fused_operators() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, block = kind("bottleneck").pair()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(kind("bottleneck").input().detach())
        assert block.why_not(x) is None
        assert block(x).shape == x.shape
