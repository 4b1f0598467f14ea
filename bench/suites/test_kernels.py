"""Every implementation of every memory-bound primitive, on ResNet-50's shapes, with cold caches.

The calls are those of `fastres bench kernel`, which shows them beside a copy of as many bytes; what
fails the parity harness on small cases is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from fastres.kernels import BACKENDS, Implementation
from fastres.testing import Call, Case, calls

from ..registry import FLUSH_BYTES, MEMORY_BOUND, QUICK, SIZES, cases_of, entries_of, why_wrong
from ..traffic import bytes_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """(implementation, label, which size) of every call that can be repeated."""
    device, quick = (metafunc.config.getoption(name) for name in ("--device", "--quick"))
    metafunc.parametrize(
        ("entry", "variant", "size"),
        [
            pytest.param(entry, call.label, size, id=f"{primitive}-{call.label}-{size}-{entry}")
            for primitive in MEMORY_BOUND
            for call in calls(primitive, QUICK[0], "reference")
            if call.in_place is None
            for entry in entries_of(primitive, None)
            if device in BACKENDS[entry.backend].devices
            for size in range(len(QUICK if quick else SIZES))
        ],
    )


@lru_cache
def _wrong(entry: Implementation, like: Case, device: str) -> str | None:
    return why_wrong(entry, like, device)


def _flush(device: str) -> Callable[[], None]:
    """Empties the caches."""
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def flush() -> None:
        buffer.zero_()
        _wait(device)

    return flush


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _call(entry: Implementation, variant: str, case: Case, device: str) -> Call:
    candidates = calls(entry.primitive, case, entry.backend, device)
    return next(call for call in candidates if call.label == variant and call.in_place is None)


def test_kernel(
    entry: Implementation, variant: str, size: int, benchmark: Any, device: str, batch: int,
    quick: bool, rounds: int,
) -> None:  # fmt: skip
    case = cases_of(entry.primitive, device, quick, batch)[size]
    call = _call(entry, variant, case, device)
    if (reason := entry.why_not(call.request)) is not None:
        pytest.skip(f"declined: {reason}")
    assert (wrong := _wrong(entry, case, device)) is None, wrong

    def run() -> object:
        result = entry.run(*call.args, **call.kwargs)
        _wait(device)
        return result

    benchmark.group = ", ".join((entry.primitive, variant, "x".join(map(str, case.shape))))
    result = benchmark.pedantic(run, setup=_flush(device), rounds=rounds, warmup_rounds=2)
    benchmark.extra_info |= {
        "implementation": str(entry), "bytes": bytes_of(entry.primitive, call, result)
    }  # fmt: skip
