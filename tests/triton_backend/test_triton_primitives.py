"""Every Triton implementation on the whole table of cases."""

from __future__ import annotations

import pytest
import torch

from fastres.primitives import PRIMITIVES, Implementation, implementations
from fastres.testing import CASES, Case, check_implementation

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_poison")]

ENTRIES = list(implementations(backend="triton"))
#: In portions, so that several processes share the work; layouts alternate in the table.
PORTIONS = [CASES[i::5] for i in range(5)]


@pytest.mark.parametrize("cases", PORTIONS, ids=lambda cases: f"from {cases[0]}")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e}-{e.primitive}")
def test_implementation_is_right_on_every_case(
    entry: Implementation, cases: tuple[Case, ...], device: str
) -> None:
    failures, ran = [], 0
    for case in cases:
        try:
            ran += len(check_implementation(entry, case, device=device).ran)
        except Exception as error:  # One that crashes is a failure like the others.
            failures.append(f"{case}: {error!r}")
    assert not failures, f"{len(failures)} cases fail, the first five:\n" + "\n".join(failures[:5])
    assert ran > 0, "everything was declined"


def test_every_primitive_has_one() -> None:
    found = {entry.primitive for entry in ENTRIES}
    assert found == set(PRIMITIVES) - {"bn_act_forward", "bn_act_backward"}


@pytest.mark.parametrize("primitive", sorted({e.primitive for e in ENTRIES}))
def test_two_runs_give_the_same_bits(primitive: str, device: str) -> None:
    """250 repeats on a GPU, where a race would show; the interpreter has none to show."""
    repeats = 250 if device == "cuda" else 2
    case = next(c for c in CASES if c.shape == (2, 16, 6, 5) and c.dtype == torch.bfloat16)
    for entry in (e for e in ENTRIES if e.primitive == primitive):
        for call in _accepted(entry, case, device):
            first = _tensors(entry.run(*call.args, **call.kwargs))
            for _ in range(repeats - 1):
                again = _tensors(entry.run(*call.args, **call.kwargs))
                for a, b in zip(first, again, strict=True):
                    assert torch.equal(a.nan_to_num(), b.nan_to_num())


def _accepted(entry: Implementation, case: Case, device: str):
    from fastres.testing import calls

    found = calls(entry.primitive, case, entry.backend, device)
    return [c for c in found if entry.why_not(c.request) is None and c.in_place is None]


def _tensors(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        # The third row of sums without a second branch is nobody's.
        return [result[:2] if result.dim() == 2 and len(result) == 3 else result]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in _tensors(part)]
    return []
