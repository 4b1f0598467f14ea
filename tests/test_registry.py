"""The registry: who is asked, in which order, and what a decline says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastres.kernels  # noqa: F401
from fastres.block import Block, Norm, Unit, make_plan
from fastres.block.plan import Context
from fastres.kernels import (
    PRIMITIVES,
    Conv,
    Request,
    implementations,
    preference,
    register,
    registry,
    select,
)

REQUEST = Request("cpu", torch.float32, True)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Copy the table, so that a test's registrations end with it."""
    copy = {key: list(entries) for key, entries in registry._TABLE.items()}
    monkeypatch.setattr(registry, "_TABLE", copy)
    make_plan.cache_clear()
    yield
    make_plan.cache_clear()


def test_unknown_primitive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"primitive must be one of .*, got 'conv_sideways'"):
        register("conv_sideways", "aten")


def test_taken_name_is_refused() -> None:
    register("add_act", "mine", name="first")(lambda: None)
    with pytest.raises(ValueError, match="mine:first is already registered for add_act"):
        register("add_act", "mine", name="first")(lambda: None)


def test_one_call_announces_an_implementation() -> None:
    register("add_act", "mine")(print)
    (entry,) = implementations("add_act", "mine")
    assert (entry.primitive, entry.backend, entry.name) == ("add_act", "mine", "print")
    assert entry.run is print and entry.why_not(REQUEST) is None
    assert str(entry) == "mine:print"


def test_implementations_filters_by_primitive_and_backend() -> None:
    assert {e.primitive for e in implementations()} >= set(PRIMITIVES) - {"conv_backward"}
    assert {e.backend for e in implementations(backend="aten")} == {"aten"}
    assert {e.primitive for e in implementations("add_act")} == {"add_act"}


def test_first_that_accepts_is_taken_and_reasons_are_kept() -> None:
    register("add_act", "one", why_not=lambda r: "too small", name="a")(print)
    register("add_act", "one", why_not=lambda r: "too odd", name="b")(print)
    register("add_act", "two", name="c")(print)
    found, reasons = select("add_act", ("one", "two"), REQUEST)
    assert str(found) == "two:c"
    assert reasons == ["one:a: too small", "one:b: too odd"]


def test_nobody_accepts() -> None:
    register("add_act", "one", why_not=lambda r: "never", name="a")(print)
    assert select("add_act", ("one", "absent"), REQUEST) == (None, ["one:a: never"])


def test_auto_ends_with_torch_and_a_named_backend_starts_with_itself() -> None:
    for device in ("cpu", "cuda", "meta"):
        assert preference("auto", device)[-1] == "aten"
    assert preference("reference", "cpu") == ("reference",)
    assert preference("cpu", "cpu") == ("cpu", "aten")


SPEC = Block((Unit(Conv(), Norm(1e-5)),), act="relu", backend="reference")
SIGNATURE = Context("cpu", torch.float32, True, ((8, 8, 1, 1),))


def test_plan_prefers_the_fused_convolution() -> None:
    plan = make_plan(SPEC, SIGNATURE)
    (conv,) = plan.convs
    assert conv is not None and conv.stats and conv.prologue is not None
    assert plan.level == "c'"
    torchs = make_plan(SPEC._replace(backend="aten"), SIGNATURE)
    assert torchs.level == "b" and torchs.declined


def test_named_backend_that_declines_a_plain_primitive_is_an_error() -> None:
    entries = registry._TABLE["scale_shift_act", "reference"]
    del entries[:]
    register("scale_shift_act", "reference", why_not=lambda r: "not today", name="x")(print)
    with pytest.raises(NotImplementedError, match=r"'reference' cannot run .*not today"):
        make_plan(SPEC, SIGNATURE)


def test_named_backend_on_a_foreign_device_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="cannot run"):
        make_plan(SPEC._replace(backend="cpu"), SIGNATURE._replace(device="cuda"))
