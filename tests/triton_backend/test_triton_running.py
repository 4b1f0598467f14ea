"""The Triton kernel of running statistics against nn.BatchNorm2d."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from running_checks import DTYPES, KERNEL_CHECKS, MOMENTA, Norm, Run

from fastres.kernels import RunningUpdate, implementations


@pytest.mark.gpu
@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_running_statistics(check: Callable[[Run, str], None], device: str) -> None:
    (entry,) = implementations("update_running", "triton")
    check(entry.run, device)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="it compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_ahead_of_time(capability: int) -> None:
    """For every kind of update, with sizes of 1 among them; a block is one launch."""
    pytest.importorskip("triton")
    from fastres.kernels.triton.launch import recording
    from fastres.testing.ahead import compiled

    (entry,) = implementations("update_running", "triton")
    for dtypes, counted in zip(DTYPES, (True, False) * len(DTYPES), strict=False):
        norms = [
            Norm(c, dtypes, m, counted, device="meta")
            for m, c in zip(MOMENTA[1:], (1, 2048, 3, 64), strict=True)
        ]
        updates = [
            RunningUpdate(
                torch.empty(5, len(n.mean), dtype=dtypes[0], device="meta"),
                n.mean,
                n.var,
                n.counter,
                n.momentum,
                1,
            )
            for n in norms
        ]
        with recording() as launches:
            entry.run(updates)
        (launch,) = launches
        found = compiled(launch, capability)
        assert found.registers > 0 and found.stack == found.local == found.shared == 0
