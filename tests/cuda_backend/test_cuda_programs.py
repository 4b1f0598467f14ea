"""Programs of kernels launched between torch's convolutions give the bits of the walk."""

from __future__ import annotations

import pytest
from kinds import Kind
from program_checks import BLOCKS, DTYPES, check_same_bits, check_written

import fastres

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_same_bits_as_the_walk(
    kind: Kind, dtypes: str, memory: str, training: bool, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with fastres.use_backend("cuda"), fastres.use_memory(memory):
        check_same_bits(kind, dtypes, training, True, device, monkeypatch)


@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_same_bits_in_the_other_layout(
    kind: Kind, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fastres.use_backend("cuda"):
        check_same_bits(kind, "float32", True, False, device, monkeypatch)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_blocks_are_written_down(kind: Kind, dtypes: str, device: str) -> None:
    with fastres.use_backend("cuda"):
        check_written(kind, dtypes, device)
