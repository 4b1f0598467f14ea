"""Every registered implementation, whoever announced it, on the whole table of cases."""

from __future__ import annotations

import pytest
import torch
from backend_checks import check_cases

import fastres.kernels  # noqa: F401  (registers the implementations)
from fastres.kernels import BACKENDS, COMPOSITES, PRIMITIVES, Implementation, implementations
from fastres.testing import (
    BENCH_CASES,
    CASES,
    Outcome,
    check_implementation,
)

pytestmark = pytest.mark.usefixtures("_poison")


def _why_not_here(entry: Implementation) -> str | None:
    """Why a backend cannot be tested on this machine's CPU, or None."""
    backend = BACKENDS[entry.backend]
    if "cpu" not in backend.devices:
        return f"{entry.backend} runs on {', '.join(backend.devices)} only"
    return backend.why_not()


@pytest.mark.parametrize("entry", list(implementations()), ids=lambda e: f"{e}-{e.primitive}")
def test_implementation_is_right_on_every_case(entry: Implementation) -> None:
    if (reason := _why_not_here(entry)) is not None:
        pytest.skip(reason)
    ran = check_cases(entry, CASES, "cpu")
    # Some primitive in some case must have been accepted, or the check checks nothing.
    assert ran >= 10, f"only {ran} calls were accepted"


@pytest.mark.parametrize("primitive", [p for p in PRIMITIVES if p not in COMPOSITES])
def test_torch_alone_can_run_every_primitive(primitive: str) -> None:
    (entry, *_) = implementations(primitive, "aten")
    plain = next(c for c in CASES if c.conv is not None)
    assert check_implementation(entry, plain).ran


def test_declined_calls_carry_their_reason() -> None:
    (entry,) = implementations("conv_forward", "aten")
    outcome: Outcome = check_implementation(entry, next(c for c in CASES if c.conv is not None))
    assert set(outcome.declined) == {"stats", "prologue", "both"}
    assert all("convolution" in reason for reason in outcome.declined.values())


def test_the_table_covers_what_goes_wrong() -> None:
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names)
    assert {c.values for c in CASES} >= {"large_mean", "constant", "outlier", "nan", "inf"}
    assert {c.dtype for c in CASES} == {
        torch.float32, torch.float64, torch.bfloat16, torch.float16,
    }  # fmt: skip
    assert {c.shape[1] for c in CASES} >= {1, 3, 17, 64}
    assert any(c.count == 0 for c in CASES) and any(c.count == 1 for c in CASES)
    assert all(c.bench for c in BENCH_CASES) and not any(c.bench for c in CASES)


def test_a_case_holds_the_same_numbers_every_time() -> None:
    case = CASES[0]
    assert torch.equal(case.activation("x"), case.activation("x"))
    assert not torch.equal(case.activation("x"), case.activation("y"))
