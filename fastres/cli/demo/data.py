"""scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels that come inside the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.cli.libraries import library

TEST_SHARE = 0.2


class Digits(NamedTuple):
    """Images [N, 1, S, S] float32 in 0..1, labels [N] int64, split once by the seed."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(size: int, seed: int) -> Digits:
    """The digits, enlarged to `size` pixels a side (bilinear), one fifth of each digit for test."""
    raw = library("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.from_numpy(raw.images.astype(np.float32) / 16).unsqueeze(1)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(raw.target.astype(np.int64))
    test = _stratified(labels, seed)
    return Digits(images[~test], labels[~test], images[test], labels[test])


def _stratified(labels: Tensor, seed: int) -> Tensor:
    """A boolean mask that takes TEST_SHARE of every class."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for digit in labels.unique():
        members = (labels == digit).nonzero().flatten()
        chosen = torch.randperm(len(members), generator=generator)
        mask[members[chosen[: round(TEST_SHARE * len(members))]]] = True
    return mask


def batches(data: Digits, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch's training batches: the same for everybody with this seed; the rest is dropped."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(len(data.train_y), generator=generator)
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield data.train_x[chosen], data.train_y[chosen]
