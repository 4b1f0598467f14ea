"""A plan depends on all that it reads: switches, kernels registered later, devices; and on whom."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastres
from fastres import functional
from fastres.block import Block, Context, Norm, Unit, current, make_plan
from fastres.block.forward import plan_of
from fastres.kernels import Conv, Request, reference, register, register_activation, registry

BLOCK = Block((Unit(Conv(), Norm(1e-5)),), act="relu")
#: One that the CPU's own convolutions leave to oneDNN.
GROUPED = Block((Unit(Conv(groups=2), Norm(1e-5)),), act="relu")


@pytest.fixture
def _own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    table = {key: list(entries) for key, entries in registry._TABLE.items()}
    monkeypatch.setattr(registry, "_TABLE", table)
    known = dict(reference.ACTIVATIONS)
    yield
    reference.ACTIVATIONS.clear()
    reference.ACTIVATIONS.update(known)
    make_plan.cache_clear()


def test_a_switch_turned_after_a_first_call_is_seen() -> None:
    pytest.importorskip("fastres._cpu")
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 2, 1, 1)
    first = plan_of(GROUPED, x, [weight])
    assert first.convs[0] is not None and first.convs[0].forward.backend == "cpu"
    with torch.backends.mkldnn.flags(enabled=False):
        second = plan_of(GROUPED, x, [weight])
    assert second.convs[0] is not None and second.convs[0].forward.backend == "aten"


@pytest.mark.usefixtures("_own_table")
def test_a_kernel_registered_after_a_first_use_is_called() -> None:
    register_activation("doubled", lambda v: 2 * v, lambda v: torch.full_like(v, 2.0))
    x = torch.randn(2, 4, 3, 3)
    expected = functional.bn_act(x, None, None, training=True, act="doubled")
    calls = []

    def only_doubled(request: Request) -> str | None:
        return None if request.act == "doubled" else "it knows one activation"

    @register("scale_shift_act", "aten", why_not=only_doubled, name="late")
    def late(y: Tensor, stats: Tensor, **more: object) -> tuple[Tensor, None]:
        calls.append(more["act"])
        return 2 * (y * stats[3].view(1, -1, 1, 1) + stats[4].view(1, -1, 1, 1)), None

    entries = registry._TABLE["scale_shift_act", "aten"]
    entries.insert(0, entries.pop())
    with fastres.use_backend("aten"):
        found = functional.bn_act(x, None, None, training=True, act="doubled")
    assert calls == ["doubled"]
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("_own_table")
def test_two_unlike_devices_have_plans_of_their_own() -> None:
    def first_alone(request: Request) -> str | None:
        return None if request.device_index == 0 else "it runs on the first device"

    @register("conv_forward", "aten", why_not=first_alone, name="of the first")
    def conv_forward(*args: object, **more: object) -> None:
        raise AssertionError("it is only looked at")

    entries = registry._TABLE["conv_forward", "aten"]
    entries.insert(0, entries.pop())
    names = []
    for index in (0, 1):
        context = Context("cpu", torch.float32, False, ((4, 4, 1, 1),), index)
        (conv,) = make_plan(BLOCK._replace(backend="aten"), context).convs
        assert conv is not None
        names.append(conv.forward.name)
    assert names == ["of the first", "convolution"]


def test_choices_are_a_threads_own() -> None:
    seen = []
    with fastres.use_backend("aten"):
        thread = threading.Thread(target=lambda: seen.append(current().backend))
        thread.start()
        thread.join()
        assert current().backend == "aten"
    assert seen == ["auto"]


def test_choices_are_an_asynchronous_tasks_own() -> None:
    async def choosing(name: str) -> str:
        with fastres.use_backend(name):
            await asyncio.sleep(0)
            return current().backend

    async def both() -> list[str]:
        return await asyncio.gather(choosing("aten"), choosing("reference"))

    assert asyncio.run(both()) == ["aten", "reference"]
