"""What `make test` leaves to `make test-full` is more of the same: nothing is left out whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _collected(folder: str, *options: str, interpreted: bool = False) -> list[str]:
    """Names of the tests that pytest would run."""
    # Of its own: it is no worker of this run.
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", folder, *options],
        check=False, capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**own, "TRITON_INTERPRET": "1" if interpreted else "0"},
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert found, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreter", "compiled"])
@pytest.mark.parametrize("folder", ["tests/triton_backend", "tests/cuda_backend"])
def test_every_test_and_every_primitive_is_left(folder: str, interpreted: bool) -> None:
    if "triton" in folder:
        pytest.importorskip("triton")
    every = _collected(folder, interpreted=interpreted)
    some = _collected(folder, "-m", "not exhaustive", interpreted=interpreted)
    assert {name.partition("[")[0] for name in every} == {name.partition("[")[0] for name in some}
    grids = ("test_implementation_is_right_on_every_case", "test_blocks_of_any_shape")
    for grid in grids:
        entries = [
            {name.partition("[")[2].partition("-from")[0].partition("-(")[0] for name in names
             if f"::{grid}[" in name}
            for names in (every, some)
        ]  # fmt: skip
        assert entries[0] == entries[1]
    for level in ("b", "b'", "c'", "c"):
        whole = f"::test_block_is_the_stock_block[{level}"
        if any(f"-{level}]" in name for name in every):
            assert any(f"-{level}]" in name for name in some), whole
    if not interpreted and "triton" in folder:
        assert any("[bf16-sm_90]" in name for name in some)
