"""Programs of kernels launched between torch's convolutions give the bits of the walk."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from backend_checks import needs_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import Kind
from program_checks import (
    BLOCKS,
    CHANNELS_LAST,
    DTYPES,
    check_same_bits,
    check_written,
    programs_of,
    walked,
)
from torch import Tensor, nn

import fastres
from fastres.kernels import RunningUpdate, register, registry, tape, tuned
from fastres.kernels.cuda import channel_block
from fastres.kernels.cuda.batch_norm import scale_shift_act
from fastres.kernels.cuda.running import update_running
from fastres.nn import Bottleneck

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_same_bits_as_the_walk(
    kind: Kind, dtypes: str, memory: str, training: bool, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with fastres.use_backend("cuda"), fastres.use_memory(memory):
        check_same_bits(kind, dtypes, training, True, device, monkeypatch)


@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_same_bits_in_the_other_layout(
    kind: Kind, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fastres.use_backend("cuda"):
        check_same_bits(kind, "float32", True, False, device, monkeypatch)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_blocks_are_written_down(kind: Kind, dtypes: str, device: str) -> None:
    with fastres.use_backend("cuda"):
        check_written(kind, dtypes, device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_same_bits_under_autocast(
    kind: Kind, training: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fastres.use_backend("cuda"):
        check_same_bits(kind, "float32", training, True, device, monkeypatch, lower=True)


@pytest.mark.parametrize("kind", BLOCKS[:3], ids=str)
def test_blocks_are_written_down_under_autocast(kind: Kind, device: str) -> None:
    """Those that begin with a convolution: a norm in front of one is given another dtype."""
    with fastres.use_backend("cuda"):
        check_written(kind, "float32", device, lower=True)


# ---------------------------------------------------------------- what a program depends on


def _block(device: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    block = Bottleneck(32, 8).to(device, memory_format=CHANNELS_LAST)
    x = torch.randn(2, 32, 5, 5, device=device)
    return block, x.contiguous(memory_format=CHANNELS_LAST)


def _steps(block: nn.Module, xs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, gradients and buffers of a step for each input."""
    found: list[Tensor] = []
    for x in xs:
        leaf = x.detach().requires_grad_()
        with fastres.use_backend("cuda"):
            out = block(leaf)
        found += [out, *torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()])]
        found += [b.clone() for b in block.buffers()]
    return found


def _walk(monkeypatch: pytest.MonkeyPatch, block: nn.Module, xs: Sequence[Tensor]) -> list[Tensor]:
    """The same on a copy of the block that is walked."""
    with monkeypatch.context() as patch:
        walked(patch)
        return _steps(copy.deepcopy(block), xs)


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_the_tuner_measures_is_no_part(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measuring(problem: Any, candidates: Any, thunk: Any, **more: Any) -> Any:
        assert tape.taping() is None or torch._C._len_torch_dispatch_stack() == 0
        measured.append(tape.taping() is not None)
        for candidate in candidates:
            thunk(candidate)()
        return candidates[0]

    block, x = _block(device)
    plain = copy.deepcopy(block)
    expected = _steps(plain, [x] * 3)
    monkeypatch.setattr(tuned, "_chosen", {})
    monkeypatch.setattr(tuned.tuning, "choose", measuring)
    measured: list[bool] = []
    assert _equal(_steps(block, [x] * 3), expected)
    assert [p.steps for p in programs_of(block)] == [p.steps for p in programs_of(plain)]
    assert any(measured)


def _misaligned(x: Tensor) -> Tensor:
    """The same values from an address that is no multiple of 16."""
    memory = torch.empty(x.numel() + 1, device=x.device)[1:]
    return memory.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).copy_(x)


def test_channel_blocks_hold_for_aligned_inputs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    possible = channel_block.variants
    monkeypatch.setattr(channel_block, "variants", lambda *args: possible(*args)[-1:])
    block, x = _block(device)
    expected = _walk(monkeypatch, block, [x, x, x, _misaligned(x), x])
    assert _equal(_steps(block, [x, x, x]), expected[: len(expected) * 3 // 5])
    (written,) = programs_of(block)
    before = written._forward
    assert _equal(_steps(block, [_misaligned(x), x]), expected[len(expected) * 3 // 5 :])
    assert written._forward is not before


def test_channel_blocks_hold_outside_of_distributed_runs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    possible = channel_block.variants
    monkeypatch.setattr(channel_block, "variants", lambda *args: possible(*args)[-1:])
    block, x = _block(device)
    _steps(block, [x, x, x])
    (written,) = programs_of(block)
    steps = written.steps
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    expected = _walk(monkeypatch, block, [x, x])
    assert _equal(_steps(block, [x, x]), expected)
    # Passes are more launches.
    assert all(a > b for a, b in zip(written.steps, steps, strict=True))


@pytest.fixture
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    table = {key: list(entries) for key, entries in registry._TABLE.items()}
    monkeypatch.setattr(registry, "_TABLE", table)


@pytest.mark.usefixtures("_own_table")
def test_an_update_of_somebody_else_is_called_each_time(device: str) -> None:
    """It may launch what no tape sees."""
    calls = []

    def theirs(updates: Sequence[RunningUpdate]) -> None:
        calls.append(1)
        update_running(updates)

    register("update_running", "cuda", name="theirs")(theirs)
    entries = registry._TABLE["update_running", "cuda"]
    entries.insert(0, entries.pop())
    block, x = _block(device)
    _steps(block, [x, x, x])
    assert len(calls) == 3


def test_programs_are_captured_in_a_graph(device: str) -> None:
    needs_gpu(device)
    block, x = _block(device)
    leaf = x.clone().requires_grad_()

    def step() -> list[Tensor]:
        with fastres.use_backend("cuda"):
            out = block(leaf)
        return [out, *torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    (written,) = programs_of(block)
    assert min(written.steps) > 1
    expected = [t.clone() for t in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert _equal(captured, expected)


# ---------------------------------------------------------------- the program itself


def _added(a: Tensor, b: Tensor) -> Tensor:
    """a + b by a kernel of ours."""
    return scale_shift_act(a, None, residual=b)[0]


def _matrix(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).view(-1, t.shape[1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Through views of both, into memory that was made before."""
    out = torch.empty_like(a)
    torch.mm(_matrix(a), _matrix(b), out=_matrix(out))
    return out


def _doubled(a: Tensor, b: Tensor) -> Tensor:
    return a.clone().mul_(2)


def _first(a: Tensor, b: Tensor) -> Tensor:
    """A part of several results."""
    return torch.ops.aten.native_dropout(a, 0.5, False)[0]


OPERATIONS = (_added, _product, torch.add, _doubled, _first)


def _run(values: Sequence[Tensor], plan: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """A tensor for each entry of `plan`, out of two before it."""
    made = list(values)
    for which, a, b in plan:
        made.append(OPERATIONS[which](made[a % len(made)], made[b % len(made)]))
    return made[len(values) :]


def _inputs() -> list[Tensor]:
    return [torch.randn(1, 8, 4, 2).contiguous(memory_format=CHANNELS_LAST) for _ in range(3)]


@settings(max_examples=50, deadline=None)
@given(
    plan=st.lists(
        st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 99), st.integers(0, 99)),
        min_size=1,
        max_size=20,
    ),
    outputs=st.sets(st.integers(0, 19), min_size=1, max_size=3),
    kept=st.sets(st.integers(0, 19), max_size=3),
)
def test_other_inputs_give_what_the_function_gives(
    plan: list[tuple[int, int, int]], outputs: set[int], kept: set[int], device: str
) -> None:
    if device != "cpu":
        pytest.skip("of the tape alone: one device is enough")
    wanted = [sorted({i % len(plan) for i in chosen}) for chosen in (outputs, kept - outputs)]
    values, others = _inputs(), [_misaligned(x) for x in _inputs()]

    def function() -> tuple[list[Tensor], list[Tensor]]:
        made = _run(values, plan)
        first, second = [[made[i] for i in chosen] for chosen in wanted]
        return first, second

    written, results = tape.record(function, values)
    assert written is not None and results is not None
    expected = _run(values, plan)
    assert _equal([*results[0], *results[1]], [expected[i] for i in (*wanted[0], *wanted[1])])
    found, expected = written(others), _run(others, plan)
    assert found is not None
    first, rest = found[: len(wanted[0])], written.views(found[len(wanted[0]) :])
    assert _equal([*first, *rest], [expected[i] for i in (*wanted[0], *wanted[1])])


def test_memory_that_nobody_told_of_is_refused() -> None:
    x, secret = _inputs()[:2]
    for function in (_added, torch.add):
        assert tape.record(lambda f=function: ([f(x, secret)], []), [x]).program is None
        assert tape.record(lambda f=function: ([f(x, secret)], []), [x], [secret]).program


def test_what_depends_on_a_value_is_refused() -> None:
    x, y = _inputs()[:2]

    def function() -> tuple[list[Tensor], list[Tensor]]:
        return [_added(x, y) if x.sum() > y.sum() else _added(y, y)], []

    written, results = tape.record(function, [x, y])
    assert written is None and results is not None


def test_memory_with_two_names_is_refused() -> None:
    x = _inputs()[0]
    assert tape.record(lambda: ([_added(x, x)], []), [x, x]).program is None


def test_nothing_of_the_first_run_is_held() -> None:
    x, held = _inputs()[0], []

    def function() -> tuple[list[Tensor], list[Tensor]]:
        y = torch.add(x, x)
        held.append(weakref.ref(y))
        return [_added(y, x)], []

    written = tape.record(function, [x]).program
    assert written is not None and held[0]() is None


def test_temporaries_are_freed_behind_their_last_call() -> None:
    """Of a chain of torch's operators two tensors live at a time."""
    x = _inputs()[0]

    def chain() -> tuple[list[Tensor], list[Tensor]]:
        y = x
        for _ in range(5):
            y = torch.add(y, x)
        return [y], []

    written = tape.record(chain, [x]).program
    assert isinstance(written, tape.TapeProgram)
    assert written.steps == 5 and written.text.count("del ") == 4
