"""Programs of kernels launched between torch's convolutions give the bits of the walk."""

from __future__ import annotations

import pytest
import torch
from kinds import Kind
from program_checks import BLOCKS, CHANNELS_LAST, DTYPES, history, lowered, programs_of, walked

import fastres

pytestmark = pytest.mark.gpu


def _same(
    one: Kind, dtypes: str, memory: str, training: bool, last: bool, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    block = lowered(one.make(), *DTYPES[dtypes]).to(device)
    if last:
        block = block.to(memory_format=CHANNELS_LAST)
    with fastres.use_backend("cuda"), fastres.use_memory(memory):
        written = history(block, last, training, device)
        walked(monkeypatch)
        expected = history(block, last, training, device)
    for found, wanted in zip(written, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_same_bits_as_the_walk(
    kind: Kind, dtypes: str, memory: str, training: bool, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _same(kind, dtypes, memory, training, True, device, monkeypatch)


@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_same_bits_in_the_other_layout(
    kind: Kind, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _same(kind, "float32", "speed", True, False, device, monkeypatch)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_blocks_are_written_down(kind: Kind, dtypes: str, device: str) -> None:
    block = lowered(kind.make(), *DTYPES[dtypes]).to(device, memory_format=CHANNELS_LAST)
    x = torch.randn(2, 8, 5, 5).to(device, DTYPES[dtypes][0])
    x = x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    with fastres.use_backend("cuda"):
        for _ in range(2):
            block(x).sum().backward()
    (written,) = programs_of(block)
    assert min(written.steps) > 1 and len(written.steps) == 2
