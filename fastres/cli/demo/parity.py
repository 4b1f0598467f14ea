"""How far may the two learning curves be apart? Derived from rounding, not guessed.

In float64 the two networks are trained side by side for some steps. Fusing reorders sums, so the
curves may differ by rounding, which training then amplifies. How much is measured: the stock
network is trained once more with every convolution's and batch norm's output moved at random by
2^-40 of itself, which is 2^13 roundings of a float64. A sum over a channel's M values strays by
about sqrt(M) roundings, and M is at most 2^17 here. So the fused curve has to stay closer to the
stock curve than that nudged curve has come up to the same step; a fault in any formula is larger.

In float32 rounding soon flips a ReLU, and from then on no two runs agree step by step. There the
yardsticks are witnesses: stock trainings that differ by rounding only, one in the contiguous
layout, one with those outputs moved by one unit in the last place. The fused curve's distance
from the stock curve (root mean square over the steps) may be twice the largest distance of a
witness: the 2x rule of the project's tests. The final accuracies may differ by what that number
of test images cannot tell apart: three standard deviations of two binomial shares.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres.cli.demo.training import Contender

NUDGE, ULP = 2.0**-40, 2.0**-23
#: Of a loss, in float64: a sum of ten exponentials, and a mean of 2^7 images added in pairs.
ROUNDINGS_OF_A_LOSS = 10 + 7
SIGMAS = 3


@dataclass
class Exact:
    """The stock network, the fused and the nudged one in float64."""

    stock: Contender
    fused: Contender
    nudged: Contender

    @classmethod
    def of(cls, model: nn.Module, total: int, seed: int) -> Exact:
        """Copies of `model`, with a learning rate planned for `total` steps."""
        copies = [
            Contender(name, copy.deepcopy(model), total, dtype=torch.float64)
            for name in ("float64, stock", "float64, fused", "float64, nudged")
        ]
        fastres.convert(copies[1].model)
        _nudge(copies[2].model, NUDGE, seed)
        return cls(*copies)

    @property
    def contenders(self) -> list[Contender]:
        """All three, to be trained on the same batches."""
        return [self.stock, self.fused, self.nudged]


@dataclass
class Verdict:
    """What was found and what was allowed.

    Attributes:
        exact: distance of the float64 curves at each step.
        exact_allowed: tolerance at each step.
        spread: distance of the float32 curves, root mean square.
        spread_allowed: twice the largest distance of a witness.
        accuracy_gap: distance of the two final accuracies.
        accuracy_allowed: what the number of test images cannot tell apart.
    """

    exact: list[float]
    exact_allowed: list[float]
    spread: float
    spread_allowed: float
    accuracy_gap: float
    accuracy_allowed: float

    @property
    def exact_agree(self) -> bool:
        """Whether every float64 step is within tolerance; false for no step at all, or a NaN."""
        inside = [d <= a for d, a in zip(self.exact, self.exact_allowed, strict=True)]
        return bool(inside) and all(inside)

    @property
    def margin(self) -> float:
        """The largest share of its tolerance that a float64 step uses."""
        return max(d / a for d, a in zip(self.exact, self.exact_allowed, strict=True))

    @property
    def spread_agrees(self) -> bool:
        """Whether the float32 curves are as close as rounding keeps any two."""
        return self.spread <= self.spread_allowed

    @property
    def accuracies_agree(self) -> bool:
        """Whether the final accuracies differ by no more than chance explains."""
        return self.accuracy_gap <= self.accuracy_allowed


def witnesses(model: nn.Module, total: int, seed: int) -> list[Contender]:
    """Stock float32 trainings that differ from the one at hand by rounding only."""
    nudged = Contender("one ulp away", copy.deepcopy(model), total)
    _nudge(nudged.model, ULP, seed)
    return [
        Contender("contiguous", copy.deepcopy(model), total, memory_format=torch.contiguous_format),
        nudged,
    ]


def _nudge(model: nn.Module, size: float, seed: int) -> None:
    """Move every output of a convolution or batch norm by at most `size` of itself, at random."""
    generator = torch.Generator().manual_seed(seed)

    def hook(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        # One factor per image and channel: drawing one per element costs more than training.
        noise = torch.rand(*out.shape[:2], 1, 1, generator=generator, dtype=out.dtype)
        return out * noise.sub_(0.5).sign_().mul_(size).add_(1).to(out.device)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(hook)


def judge_exact(
    stock: Sequence[float], fused: Sequence[float], nudged: Sequence[float]
) -> tuple[list[float], list[float]]:
    """(distance, tolerance) of the float64 curves at each step."""
    eps = torch.finfo(torch.float64).eps
    reached, distances, allowed = 0.0, [], []
    for own, other, moved in zip(stock, fused, nudged, strict=True):
        reached = max(reached, abs(moved - own))
        distances.append(abs(other - own))
        allowed.append(reached + ROUNDINGS_OF_A_LOSS * eps * abs(own))
    return distances, allowed


def distance(first: Sequence[float], second: Sequence[float], steps: int) -> float:
    """Root mean square of the difference of two curves over their first steps."""
    pairs = zip(first[:steps], second[:steps], strict=True)
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / steps)


def accuracy_tolerance(accuracies: tuple[float, float], images: int) -> tuple[float, float]:
    """(distance, three standard deviations of the difference of two such binomial shares)."""
    p = sum(accuracies) / 2
    return abs(accuracies[0] - accuracies[1]), SIGMAS * math.sqrt(2 * p * (1 - p) / images)


def judge(
    exact: Exact, stock: Contender, fused: Contender, others: Sequence[Contender], images: int
) -> Verdict:
    """Everything that is to be compared, once all are trained.

    Args:
        exact: the float64 trainings.
        stock: the stock float32 training.
        fused: the fused one.
        others: witnesses of the stock one, perhaps over fewer steps.
        images: number of test images behind an accuracy.
    """
    distances, allowed = judge_exact(*(c.losses for c in exact.contenders))
    steps = len(others[0].losses)
    largest = max(distance(w.losses, stock.losses, steps) for w in others)
    gap, chance = accuracy_tolerance((stock.accuracies[-1], fused.accuracies[-1]), images)
    spread = distance(fused.losses, stock.losses, steps)
    return Verdict(distances, allowed, spread, 2 * largest, gap, chance)
