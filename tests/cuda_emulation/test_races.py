"""The CUDA kernels have no data races, and not a barrier too many."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

import build  # isort: skip -- of this folder

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which(build.COMPILER), reason="needs g++ on Linux"
)

FOLDER = build.CSRC / "cuda"
BARRIER = re.compile(r"^\s*(__syncthreads|__syncwarp|grid_barrier)\(.*\);")
SOURCES = [path for path in sorted(FOLDER.iterdir()) if path.name != "platform.h"]
#: "merge.h:19" of every barrier in the kernels.
BARRIERS = [
    f"{path.name}:{number}"
    for path in SOURCES
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if BARRIER.match(line)
]


@pytest.fixture(scope="module")
def races() -> Path:
    sources = [*build.kernels(), build.HERE / "races.cpp"]
    return build.build_program("races", sources, "thread")


@pytest.mark.parametrize("seed", ["0", "7"])
def test_no_kernel_has_a_race(races: Path, seed: str) -> None:
    done = build.run_program(races, SEED=seed)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize("barrier", BARRIERS)
def test_every_barrier_is_needed(races: Path, barrier: str) -> None:
    done = build.run_program(races, OMIT=barrier)
    assert done.returncode != 0, f"nothing is reported without the barrier at {barrier}"
    assert "data race" in done.stdout or "error: " in done.stdout


def test_every_barrier_is_one_of_those() -> None:
    """No barrier hides in the middle of a line."""
    text = "".join(path.read_text() for path in SOURCES)
    calls = re.findall(r"\b(?:__syncthreads|__syncwarp|grid_barrier)\(", text)
    assert len(calls) == len(BARRIERS) > 0
