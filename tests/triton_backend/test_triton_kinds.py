"""Pre-activation, wide and squeeze-excite blocks by the triton backend, held to torch's."""

from __future__ import annotations

import pytest
import torch
from kinds import RANDOM, Kind, kind
from module_parity import assert_same, step

import fastres
from fastres.testing import check_block

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_poison")]

SMALL = (8, 5, 4)


def _check(kind: Kind, device: str, level: str, memory: str, training: bool = True) -> None:
    stock, block = kind.pair(training=training, device=device)
    x = kind.input(device=device, shape=SMALL)
    with fastres.use_backend("triton"), fastres.use_level(level), fastres.use_memory(memory):
        check_block(stock, block, x, what=f"{level}, {memory}, {kind}")


@pytest.mark.parametrize(("level", "memory"), [("b", "speed"), ("c'", "lean"), ("c", "balanced")])
@pytest.mark.parametrize(
    "name", ["preact-basic-activated", "wide-projection", "se-bottleneck-projection", "no-norms-se"]
)
def test_block_is_the_stock_block(name: str, level: str, memory: str, device: str) -> None:
    _check(kind(name), device, level, memory)


@pytest.mark.parametrize("name", ["wide-dropout-projection", "se-drop-path"])
def test_random_numbers_are_torchs(name: str, device: str) -> None:
    found = []
    for module in kind(name).pair(device=device):
        torch.manual_seed(7)
        with fastres.use_backend("triton"), fastres.use_level("c"):
            found.append(step(module, kind(name).input(device=device, shape=SMALL)))
    assert_same(found[1], found[0])


@pytest.mark.grid(7)
@pytest.mark.parametrize("kind", RANDOM, ids=str)
def test_all_random_ones(kind: Kind, device: str) -> None:
    test_random_numbers_are_torchs(kind.name, device)
