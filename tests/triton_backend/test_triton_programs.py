"""Programs of Triton's kernels, convolutions included, give the bits of the walk."""

from __future__ import annotations

import pytest
from kinds import Kind
from program_checks import BLOCKS, check_same_bits, check_written

import fastres

pytestmark = pytest.mark.gpu

SOME = [b for b in BLOCKS if b.name in ("basic", "projected", "preact-basic-projection")]


@pytest.mark.grid(4)
@pytest.mark.parametrize(("level", "memory"), [("b", "speed"), ("c'", "lean"), ("c", "balanced")])
@pytest.mark.parametrize("kind", SOME, ids=str)
def test_same_bits_as_the_walk(
    kind: Kind, level: str, memory: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fastres.use_backend("triton"), fastres.use_level(level), fastres.use_memory(memory):
        check_same_bits(kind, "mixed", True, True, device, monkeypatch)


@pytest.mark.grid(3)
@pytest.mark.parametrize("level", ["b", "c"])
@pytest.mark.parametrize("kind", SOME, ids=str)
def test_blocks_are_written_down(kind: Kind, level: str, device: str) -> None:
    with fastres.use_backend("triton"), fastres.use_level(level):
        check_written(kind, "mixed", device)
