"""docs/coverage.md is what its command finds, and what it counts is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handwritten import DoubleConv, Textbook, WithSqueeze, conv3, network
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from bench import coverage
from bench.dataflow import pairs, record, residuals
from bench.zoo import ZOO
from fastres.cli.errors import CommandError
from fastres.cli.libraries import library

PAGE = coverage.PAGE.read_text(encoding="utf-8")
ROWS = coverage.rows_of(PAGE)

#: Rows that are measured anew; the others take minutes.
FAST = [
    *[name for name in ZOO if name.startswith("by hand")],
    "torchvision:resnet18", "torchvision:resnet18_fpn backbone, frozen norms", "timm:resnet18",
]  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_rows(name: str) -> None:
    if (package := name.partition(":")[0]) != "by hand":
        try:
            library(package)
        except CommandError as error:
            pytest.skip(str(error))
    found, row = coverage.cover(name), ROWS[name]
    assert (found.blocks, found.pairs, found.reasons) == (row.blocks, row.pairs, row.reasons)
    assert max(found.error, row.error) <= coverage.ALLOWED


def test_the_page() -> None:
    """All networks are there, in the order of the list, and the words are the command's."""
    assert [*ROWS] == [*ZOO] and len(ROWS) >= 60
    assert coverage.page([*ROWS.values()]) == PAGE
    assert all(row.error <= coverage.allowed(name) for name, row in ROWS.items())


def test_what_is_aimed_at() -> None:
    blocks, chains = [[getattr(row, what) for row in ROWS.values()] for what in ("blocks", "pairs")]
    assert sum(one[0] for one in blocks) >= 0.85 * sum(one[1] for one in blocks)
    assert sum(one[0] for one in chains) >= 0.90 * sum(one[1] for one in chains)


def test_nothing_is_fused_without_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastres, "convert", fastres.explain)
    found = coverage.cover("by hand:textbook")
    assert (found.blocks, found.pairs, found.error) == ((0, 2), (0, 6), 0.0)


def test_a_wrong_conversion_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any) -> Any:
        with torch.no_grad():
            model[1].weight[0] *= 1 + 1e-6
        return fastres.explain(model)

    monkeypatch.setattr(fastres, "convert", wrong)
    assert coverage.cover("by hand:textbook").error > coverage.ALLOWED


# ---------------------------------------------------------------- what is counted


class Pyramid(nn.Module):
    """Lateral and coarser maps are added: no residual block, though both come from one value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Textbook(3, 4), Textbook(4, 4, 2)
        self.lateral, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        coarse = self.second(fine)
        return self.norm(self.lateral(fine)) + F.interpolate(coarse, scale_factor=2.0)


class GivenShortcut(Textbook):
    """The shortcut is an argument, as in DLA."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.block = conv3(3, 4), GivenShortcut(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.project(x))


class Activated(nn.Module):
    """Both sides have an activation: two branches, no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(conv3(3, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.right = nn.Sequential(conv3(3, 4), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize(
    ("make", "blocks", "conv_norms"),
    [
        (lambda: nn.Sequential(Textbook(3, 4), Textbook(4, 4)), 2, 5),
        (lambda: WithSqueeze(3, 4), 1, 3),
        (lambda: DoubleConv(3, 4), 0, 2),
        (lambda: network("pre-activation"), 2, 3),
        (Pyramid, 2, 7),
        (Around, 1, 2),
        (Activated, 0, 2),
    ],
)
def test_counts(make: Any, blocks: int, conv_norms: int) -> None:
    model, x = make(), torch.randn(2, 3, 8, 8)
    run = record(lambda: model(x), modules=True)
    assert (len(residuals(run)), len(pairs(run))) == (blocks, conv_norms)
