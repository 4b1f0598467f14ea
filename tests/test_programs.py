"""Programs: a block's kernels written down once give the bits of the walk that calls them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import Kind
from program_checks import (
    BLOCKS,
    CHANNELS_LAST,
    DTYPES,
    check_same_bits,
    history,
    lowered,
    programs_of,
    walked,
)
from torch import Tensor, nn

import fastres
from fastres.kernels import Conv, register, registry
from fastres.nn import BasicBlock, Bottleneck
from fastres.nn.bound import _bound

_cpu = pytest.importorskip("fastres._cpu")

from fastres.kernels.cpu import native, program  # noqa: E402
from fastres.kernels.cpu.pointwise import add_act, scale_shift_act  # noqa: E402

#: Their convolutions have groups, or pooling stands in front of one: torch computes something.
_BY_TORCH = ("preact-bottleneck", "preact-bottleneck-projection")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [CHANNELS_LAST, torch.contiguous_format])
@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_same_bits_as_the_walk(
    kind: Kind, dtypes: str, memory: str, weights: torch.memory_format, training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    block = lowered(kind.make(), *DTYPES[dtypes]).to(memory_format=weights)
    with fastres.use_memory(memory):
        written = history(block, True, training)
        walked(monkeypatch)
        expected = history(block, True, training)
    for one, other in zip(written, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_blocks_are_written_down(kind: Kind, dtypes: str) -> None:
    block = lowered(kind.make(), *DTYPES[dtypes]).to(memory_format=CHANNELS_LAST)
    x = torch.randn(2, 8, 5, 5).to(DTYPES[dtypes][0])
    x = x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    block(x).sum().backward()
    (written,) = programs_of(block)
    if kind.name in _BY_TORCH:
        assert written.steps == (0,)
    else:
        assert min(written.steps) > 1 and len(written.steps) == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_same_bits_under_autocast(
    kind: Kind, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_same_bits(kind, "float32", training, True, "cpu", monkeypatch, lower=True)


def test_nothing_is_held_of_what_autocast_casts() -> None:
    block = Bottleneck(8, 2).to(memory_format=CHANNELS_LAST)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x.requires_grad_())
    (call,) = _bound[block].calls
    assert call is not None and call.tensors == []
    assert call.updates is not None and call.updates.layers is _bound[block].match.layers
    assert out.dtype == torch.bfloat16 and call.run.programs is not None


def test_what_torch_computes_is_not_written_down() -> None:
    shortcut = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    block = BasicBlock(8, 8, stride=2, downsample=shortcut)
    stock = copy.deepcopy(block)
    stock.__class__ = fastres.nn.stock.BasicBlock
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(block(x), stock(x))
    assert [p.steps for p in programs_of(block)] == [(0,)]


def test_one_norm_in_two_places_is_walked() -> None:
    """Its running statistics take in two batches: memory with two names."""
    block = BasicBlock(8, 8)
    block.bn2 = block.bn1
    stock = copy.deepcopy(block)
    stock.__class__ = fastres.nn.stock.BasicBlock
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(block(x), stock(x))
    torch.testing.assert_close(block.bn1.running_var, stock.bn1.running_var)
    assert block.bn1.num_batches_tracked == stock.bn1.num_batches_tracked == 2


@pytest.fixture
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    table = {key: list(entries) for key, entries in registry._TABLE.items()}
    monkeypatch.setattr(registry, "_TABLE", table)


@pytest.mark.usefixtures("_own_table")
def test_a_kernel_of_somebody_else_is_called_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may compute without torch: nothing would show of that while it is written down."""
    calls = []

    def theirs(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, **more: Any) -> Any:
        calls.append(1)
        return native.conv_forward(x, weight, bias, conv, **more)

    register("conv_forward", "cpu", name="theirs")(theirs)
    entries = registry._TABLE["conv_forward", "cpu"]
    entries.insert(0, entries.pop())
    block = BasicBlock(8, 8)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    for _ in range(3):
        block(x)
    assert len(calls) == 6


# ---------------------------------------------------------------- weights that change in inference


def _inference(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return block(x)


def _assign(weight: Tensor) -> None:
    weight.data = weight.data * 1.5


CHANGES = {
    "in place": lambda weight: weight.mul_(1.5),
    "through data": lambda weight: weight.data.mul_(1.5),
    "another memory": _assign,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_packed_anew(change: Any) -> None:
    block = BasicBlock(8, 8).eval()
    x = torch.randn(1, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    before = _inference(block, x)
    with torch.no_grad():
        change(block.conv2.weight)
    after = _inference(block, x)
    fresh = copy.deepcopy(block)
    assert not torch.equal(before, after)
    assert torch.equal(after, _inference(fresh, x))
    assert torch.equal(after, _inference(block, x))


def test_another_instruction_set_writes_anew() -> None:
    isas = _cpu.isas()
    if len(isas) < 2:
        pytest.skip("one instruction set only")
    block = Bottleneck(8, 2)
    frozen = copy.deepcopy(block).eval()
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    grad = torch.randn_like(x)
    before = _cpu.isa()
    try:
        for isa in (*isas, *isas):
            _cpu.set_isa(isa)
            used = x.clone().requires_grad_()
            block(used).backward(grad)
            expected = x.clone().requires_grad_()
            copy.deepcopy(block)(expected).backward(grad)
            assert torch.equal(used.grad, expected.grad)
            assert torch.equal(_inference(frozen, x), _inference(copy.deepcopy(frozen), x))
    finally:
        _cpu.set_isa(before)


# ---------------------------------------------------------------- around a program


def test_a_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running statistics are updated behind all that may fail, as torch's are."""
    block = Bottleneck(8, 2)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    block(x)
    before = copy.deepcopy(block.state_dict())

    class Failing:
        def run(self, *_: object) -> bool:
            raise MemoryError

    (written,) = programs_of(block)
    monkeypatch.setattr(written._forward, "_core", Failing())
    with pytest.raises(MemoryError):
        block(x)
    after = block.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_buffers_say_that_they_changed() -> None:
    block = BasicBlock(8, 8)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    block(x)
    versions = [b._version for b in block.buffers()]
    block(x)
    assert all(b._version > v for b, v in zip(block.buffers(), versions, strict=True))


def test_a_graph_that_is_kept_is_run_twice() -> None:
    block = Bottleneck(8, 2)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    out = block(x)
    first = torch.autograd.grad(out.sum(), [x, *block.parameters()], retain_graph=True)
    second = torch.autograd.grad(out.sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("strides", ["expanded", "contiguous"])
def test_gradients_in_another_layout(strides: str) -> None:
    block = Bottleneck(8, 2)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    grad = torch.randn(2, 8, 1, 1).expand(2, 8, 5, 5)
    other = grad if strides == "expanded" else grad.contiguous()
    results = []
    for g in (grad.contiguous(memory_format=CHANNELS_LAST), other):
        leaf = x.clone().requires_grad_()
        block(leaf).backward(g)
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_threads_share_a_block() -> None:
    block = Bottleneck(8, 2).eval()
    xs = [torch.randn(2, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST) for _ in range(8)]
    expected = [block(x) for x in xs]
    fresh, found = copy.deepcopy(block), {}

    def work(i: int) -> None:
        for _ in range(20):
            leaf = xs[i].clone().requires_grad_()
            found[i] = fresh(leaf)
            found[i].sum().backward()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(len(xs)))


def test_what_is_saved_may_be_moved_by_hooks() -> None:
    block = Bottleneck(8, 2)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST)
    grads = []
    for hooked in (False, True):
        leaf = x.clone().requires_grad_()
        if hooked:
            with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone):
                out = block(leaf)
        else:
            out = block(leaf)
        out.sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


# ---------------------------------------------------------------- the program itself


def _copied(values: Sequence[Tensor], plan: Sequence[tuple[int, int]]) -> list[Tensor]:
    """A tensor for each pair in `plan`, the sum of two before it, by our own kernels."""
    made = list(values)
    for a, b in plan:
        made.append(native_sum(made[a % len(made)], made[b % len(made)]))
    return made[len(values) :]


def native_sum(a: Tensor, b: Tensor) -> Tensor:
    return add_act(a, b, act="none")[0]


@settings(max_examples=50, deadline=None)
@given(
    plan=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=30),
    outputs=st.sets(st.integers(0, 29), min_size=1, max_size=3),
)
def test_temporaries_that_live_at_once_lie_apart(
    plan: list[tuple[int, int]], outputs: set[int]
) -> None:
    values = [torch.randn(1, 16, 1, 1) for _ in range(3)]
    wanted = sorted({i % len(plan) for i in outputs})

    def function() -> tuple[list[Tensor], list[Tensor]]:
        made = _copied(values, plan)
        return [made[i] for i in wanted], []

    written = program.record(function, values).program
    assert written is not None
    others = [torch.randn(1, 16, 1, 1) for _ in range(3)]
    made = _copied(others, plan)
    results = written(others)
    assert results is not None
    assert all(torch.equal(r, made[i]) for r, i in zip(results, wanted, strict=True))


def test_temporaries_share_memory() -> None:
    """A chain needs two places, however long it is."""
    x = torch.randn(1, 1024, 1, 1)

    def chain() -> tuple[list[Tensor], list[Tensor]]:
        y = x
        for _ in range(10):
            y = native_sum(y, x)
        return [y], []

    written = program.record(chain, [x]).program
    assert written is not None and written.steps == 10
    assert written._core.scratch_bytes == 2 * 4096


def test_memory_that_nobody_told_of_is_refused() -> None:
    x, secret = torch.randn(1, 16, 1, 1), torch.randn(1, 16, 1, 1)
    assert program.record(lambda: ([native_sum(x, secret)], []), [x]).program is None
    assert program.record(lambda: ([native_sum(x, secret)], []), [x], [secret]).program is not None


@pytest.mark.parametrize(
    "compute", [Tensor.exp, lambda t: t.mul_(2), Tensor.half], ids=["new", "in place", "half"]
)
def test_what_no_step_stands_for_is_refused(compute: Any) -> None:
    x = torch.randn(1, 16, 1, 1)
    before = x.clone()
    assert program.record(lambda: ([native_sum(compute(x), x)], []), [x]).program is None
    # What was begun is over: kernels compute again, and nothing was changed.
    assert torch.equal(x, before)
    assert torch.equal(native_sum(x, x), x + x)


def test_nothing_is_computed_while_it_is_written_down() -> None:
    x = torch.ones(1, 16, 1, 1)
    out = torch.zeros(1, 16, 1, 1)
    stats = torch.ones(5, 16)

    def in_place() -> tuple[list[Tensor], list[Tensor]]:
        scale_shift_act(x, stats, out=out)
        return [], []

    written = program.record(in_place, [x, stats, out]).program
    assert written is not None and not out.any()
    assert written([x, stats, out]) == [] and out.eq(2).all()
