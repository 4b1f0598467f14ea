"""Every Triton implementation on the whole table of cases."""

from __future__ import annotations

import pytest
from backend_checks import check_cases, check_repeats

from fastres.primitives import PRIMITIVES, Implementation, implementations
from fastres.testing import CASES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_poison")]

ENTRIES = list(implementations(backend="triton"))
#: In portions, so that several processes share the work; layouts alternate in the table.
PORTIONS = [CASES[i::5] for i in range(5)]


@pytest.mark.parametrize("cases", PORTIONS, ids=lambda cases: f"from {cases[0]}")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e}-{e.primitive}")
def test_implementation_is_right_on_every_case(
    entry: Implementation, cases: tuple[Case, ...], device: str
) -> None:
    assert check_cases(entry, cases, device) > 0, "everything was declined"


def test_every_primitive_has_one() -> None:
    found = {entry.primitive for entry in ENTRIES}
    assert found == set(PRIMITIVES) - {"bn_act_forward", "bn_act_backward"}


@pytest.mark.parametrize("primitive", sorted({e.primitive for e in ENTRIES}))
def test_two_runs_give_the_same_bits(primitive: str, device: str) -> None:
    """250 repeats on a GPU, where a race would show; the interpreter has none to show."""
    own = (entry for entry in ENTRIES if entry.primitive == primitive)
    check_repeats(own, device, 250 if device == "cuda" else 2)
