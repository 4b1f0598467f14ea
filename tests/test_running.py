"""Running statistics: every implementation against nn.BatchNorm2d, and the operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy

import pytest
import torch
from running_checks import (
    CHECKS,
    KERNEL_CHECKS,
    Norm,
    Run,
    batch,
    check_layouts,
    check_shared,
    check_steps,
)
from torch import Tensor

from fastres.block import running, use_backend
from fastres.block.running import update_running
from fastres.kernels import (
    BACKENDS,
    Implementation,
    RunningUpdate,
    implementations,
    reference,
    register,
    registry,
)

HERE = [
    entry
    for entry in implementations("update_running")
    if "cpu" in BACKENDS[entry.backend].devices and BACKENDS[entry.backend].why_not() is None
]
OPERATOR = torch.ops.fastres.update_running


def _checks(entry: Implementation) -> Sequence[Callable[[Run, str], None]]:
    return CHECKS if entry.backend in ("aten", "reference") else KERNEL_CHECKS


@pytest.mark.parametrize(
    ("entry", "check"),
    [(entry, check) for entry in HERE for check in _checks(entry)],
    ids=lambda v: str(v) if isinstance(v, Implementation) else v.__name__.removeprefix("check_"),
)
def test_implementation(entry: Implementation, check: Callable[[Run, str], None]) -> None:
    check(entry.run, "cpu")


def _operator(updates: Sequence[RunningUpdate]) -> None:
    running._dispatch(updates, "auto")


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("run", [update_running, _operator])
def test_front(run: Run, check: Callable[[Run, str], None]) -> None:
    check(run, "cpu")


# ---------------------------------------------------------------- planted faults


def _biased(updates: Sequence[RunningUpdate]) -> None:
    reference.update_running([u._replace(count=10**15) for u in updates])


def _inverted(updates: Sequence[RunningUpdate]) -> None:
    turned = [u if u.momentum is None else u._replace(momentum=1 - u.momentum) for u in updates]
    reference.update_running(turned)


def _uncounted(updates: Sequence[RunningUpdate]) -> None:
    before = [None if u.counter is None else u.counter.clone() for u in updates]
    reference.update_running(updates)
    for u, counter in zip(updates, before, strict=True):
        if counter is not None:
            u.counter.copy_(counter)


def _counted_afterwards(updates: Sequence[RunningUpdate]) -> None:
    """A cumulative average by the counter before its increment."""
    for u in updates:
        if u.counter is not None and u.momentum is None:
            u = u._replace(momentum=1.0 / u.counter.double())
        reference.update_running([u])


def _second_lost(updates: Sequence[RunningUpdate]) -> None:
    """Of a shared norm, as with all buffers read before any is written."""
    reference.update_running(list({id(u.running_mean): u for u in updates}.values()))


def _order_reversed(updates: Sequence[RunningUpdate]) -> None:
    reference.update_running(updates[::-1])


def _stride_forgotten(updates: Sequence[RunningUpdate]) -> None:
    def dense(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.as_strided(t.shape, (1,))

    reference.update_running(
        [
            u._replace(running_mean=dense(u.running_mean), running_var=dense(u.running_var))
            for u in updates
        ]
    )


def _buffers_for_nothing(updates: Sequence[RunningUpdate]) -> None:
    """Without a mean the variance is left out too."""
    reference.update_running([u for u in updates if u.running_mean is not None])


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (_biased, check_steps),
        (_inverted, check_steps),
        (_uncounted, check_steps),
        (_counted_afterwards, check_steps),
        (_second_lost, check_shared),
        (_order_reversed, check_shared),
        (_stride_forgotten, check_layouts),
        (_buffers_for_nothing, check_layouts),
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_planted_fault_is_found(fault: Run, check: Callable[[Run, str], None]) -> None:
    with pytest.raises(AssertionError):
        check(fault, "cpu")


# ---------------------------------------------------------------- who is chosen


@pytest.fixture
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A copy of the registry, so that a test's registrations end with it."""
    copy = {key: list(entries) for key, entries in registry._TABLE.items()}
    monkeypatch.setattr(registry, "_TABLE", copy)
    yield
    running._choose.cache_clear()


@pytest.mark.usefixtures("_table")
def test_a_kernel_registered_later_is_taken() -> None:
    norm = Norm()
    update_running([norm.update(batch())])
    calls = []
    del registry._TABLE["update_running", "aten"][:]
    register("update_running", "aten", name="later")(calls.append)
    with use_backend("aten"):
        update_running([norm.update(batch())])
    assert len(calls) == 1


@pytest.mark.usefixtures("_table")
def test_the_choice_follows_the_backend() -> None:
    chosen = []
    for backend in ("aten", "reference"):
        del registry._TABLE["update_running", backend][:]
        register("update_running", backend, name="mine")(lambda _, b=backend: chosen.append(b))
    update = Norm().update(batch())
    for backend in ("aten", "reference"):
        with use_backend(backend):
            update_running([update])
            running._dispatch([update], backend)
    assert chosen == ["aten", "aten", "reference", "reference"]


def test_a_tensor_as_momentum_and_an_odd_counter_go_to_the_formula() -> None:
    for momentum in (torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)):
        norm = Norm(momentum=0.25)
        norm.follow(x := batch())
        update_running([norm.update(x)._replace(momentum=momentum)])
        norm.check()
    norm = Norm(momentum=None)
    norm.counter = norm.counter.to(torch.int32)
    norm.follow(x := batch())
    update_running([norm.update(x)])
    norm.check()


def test_meta_tensors_do_nothing() -> None:
    update = Norm(device="meta").update(batch())
    update_running([update])
    _operator([update])


def test_inference_mode() -> None:
    with torch.inference_mode():
        norm = Norm()
        norm.follow(x := batch())
        update_running([norm.update(x)])
        norm.check()


# ---------------------------------------------------------------- the operator


@pytest.mark.parametrize("backend", sorted({entry.backend for entry in HERE}))
def test_opcheck(backend: str) -> None:
    norms = [Norm(5), Norm(3, momentum=None), Norm(4, counted=False)]
    one, two, three = (norm.update(batch(len(norm.mean))) for norm in norms)
    two = two._replace(running_mean=None)
    arguments = (
        [one.stats, two.stats, three.stats],
        [one.running_mean, one.running_var, two.running_var, three.running_mean, three.running_var],
        [one.counter, two.counter],
        [True, True, True, False, True, True, True, True, False],
        [0.1, None, 0.1],
        [one.count, two.count, three.count],
        backend,
    )
    torch.library.opcheck(OPERATOR.default, arguments)


def test_a_mode_sees_the_operator() -> None:
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    norm = Norm()
    norm.follow(x := batch())
    update = norm.update(x)
    with Mode():
        update_running([update])
    assert seen[0] is OPERATOR.default
    norm.check()


def test_fake_tensors_stay_fake() -> None:
    with torch._subclasses.FakeTensorMode():
        stats, mean = torch.zeros(5, 3), torch.zeros(3)
        update_running([RunningUpdate(stats, mean, mean.clone(), None, 0.1, 8)])


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("momentum", [0.1, None, "tensor"], ids=str)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiles_without_a_graph_break(
    compiler: str, momentum: float | str | None, shared: bool
) -> None:
    factor = torch.tensor(0.1) if momentum == "tensor" else momentum
    first = Norm(5, momentum=None if momentum is None else 0.1)
    second = first if shared else deepcopy(first)

    def step(x: Tensor, stats: Tensor, other: Tensor) -> Tensor:
        count = x.numel() // x.shape[1]
        for _ in range(2):
            update_running(
                [
                    RunningUpdate(stats, first.mean, first.var, first.counter, factor, count),
                    RunningUpdate(other, second.mean, second.var, second.counter, factor, count),
                ]
            )
            x = x + first.mean.view(1, -1, 1, 1)
        return x

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    for count in (12, 20, 36):
        x, y = batch(count=count), batch(count=count)
        expected = [x, y, x, y] if shared else [x, x]
        first.follow(*expected)
        if not shared:
            second.follow(y, y)
        compiled(x, first.update(x).stats, second.update(y).stats)
        first.check()
        second.check()


def test_operator_carries_symbolic_counts() -> None:
    torch._dynamo.reset()
    norm = Norm()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph

    def step(x: Tensor, stats: Tensor) -> None:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        update_running([RunningUpdate(stats, norm.mean, norm.var, norm.counter, 0.1, count)])

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for count in (12, 20, 36):
        norm.follow(x := batch(count=count))
        compiled(x, norm.update(x).stats)
        norm.check()
    assert len(graphs) == 1
