"""ResNet-50's blocks and convolutions, forward and backward and inference, beside stock torch.

Steps, contenders and the parity gate are those of `fastres bench block` and `conv`.
"""

from __future__ import annotations

from typing import Any

import pytest

from .. import gate
from ..contenders import Job, why_not
from ..measure import Measured
from ..models import IMAGE_SIZE, PARTS

CONTENDERS = ("eager", "channels_last", "compile", "fastres")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every part in both modes by every contender; quick, one part of each kind, uncompiled."""
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize("contender", [n for n in CONTENDERS if not (quick and n == "compile")])
    metafunc.parametrize("mode", ["train", "infer"])
    names = [(kind, n) for kind, named in PARTS.items() for n in [*named][: 1 if quick else None]]
    metafunc.parametrize(("kind", "name"), names, ids=map(": ".join, names))


def test_part(
    kind: str, name: str, mode: str, contender: str, benchmark: Any, device: str, batch: int,
    quick: bool, rounds: int,
) -> None:  # fmt: skip
    job = Job(
        kind, name, batch, 32 if quick else IMAGE_SIZE, contender, mode,
        "bfloat16" if device == "cuda" else "float32", device=device,
    )  # fmt: skip
    if (reason := why_not(job)) is not None:
        pytest.skip(reason)
    assert (parity := gate.parity_of(job)) == "ok", parity
    with job.settings():
        measured = Measured(job)
        benchmark.group = f"{kind} {job.subject.label}, {mode}, batch {batch}"
        benchmark.pedantic(measured.milliseconds, rounds=rounds)
    facts = measured.facts
    benchmark.extra_info |= {
        "contender": contender, "saved_bytes": facts.saved_bytes, "level": facts.level
    }  # fmt: skip
