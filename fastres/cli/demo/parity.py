"""How far may the two learning curves be apart? Derived from rounding, not guessed.

The truth is the stock network trained in float64. The stock network in float32 strays from it by
rounding alone; so do *witnesses*, the same float32 training with another order of summation (the
contiguous layout) and with inputs moved by one unit in the last place. The largest distance that
any of them has reached up to a step is what rounding alone does. The fused curve may be twice as
far: the 2x rule of the project's tests, for the curve. A loss is itself a float32, which adds a
few of its roundings. Training amplifies differences exponentially, so the rule holds for the
steps before they reach one percent of the loss; from there on no two float32 runs agree, and what
is left to compare is the accuracy, within what the number of test images can tell apart.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastres.cli.demo.training import Contender

#: Of a loss, in float32: softmax, logarithm, mean and the final rounding.
ROUNDINGS_OF_A_LOSS = 4
CHAOS = 0.01
SIGMAS = 3


@dataclass
class Verdict:
    """Distances from the float64 curve, step by step, and what was allowed.

    Attributes:
        stock: largest distance of any stock float32 run at this step.
        fused: distance of the fused run.
        allowed: tolerance at this step.
        accuracy_gap: distance of the two final accuracies.
        accuracy_allowed: what the number of test images cannot tell apart.
    """

    stock: list[float]
    fused: list[float]
    allowed: list[float]
    accuracy_gap: float
    accuracy_allowed: float

    @property
    def margin(self) -> float:
        """The largest share of its tolerance that the fused curve uses."""
        return max((f / a for f, a in zip(self.fused, self.allowed, strict=True)), default=0.0)

    @property
    def curves_agree(self) -> bool:
        """Whether every early step is within its tolerance; false where there is none, or a NaN."""
        inside = [f <= a for f, a in zip(self.fused, self.allowed, strict=True)]
        return bool(inside) and all(inside)

    @property
    def accuracies_agree(self) -> bool:
        """Whether the final accuracies differ by no more than chance explains."""
        return self.accuracy_gap <= self.accuracy_allowed


def witnesses(model: nn.Module, total: int, seed: int) -> list[Contender]:
    """The float64 truth first, then float32 runs that differ from stock by rounding only."""
    nudged = Contender("one ulp away", copy.deepcopy(model), total)
    nudged.model.register_forward_pre_hook(_nudge(seed))
    return [
        Contender("float64", copy.deepcopy(model), total, dtype=torch.float64),
        Contender(
            "contiguous",
            copy.deepcopy(model),
            total,
            memory_format=torch.contiguous_format,
        ),
        nudged,
    ]


def _nudge(seed: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = inputs
        up = torch.rand(x.shape, generator=generator).to(x.device) < 0.5
        # Towards 2 or towards -1: the pixels lie in 0..1.
        return (torch.nextafter(x, torch.where(up, 2.0, -1.0).to(x.dtype)),)

    return hook


def judge(
    truth: Sequence[float],
    stock: Sequence[Sequence[float]],
    fused: Sequence[float],
    accuracies: tuple[float, float],
    test_images: int,
) -> Verdict:
    """Compare the curves where chaos has not set in, and the accuracies at the end.

    Args:
        truth: loss per step in float64.
        stock: loss per step of every stock float32 run.
        fused: loss per step of the fused run.
        accuracies: final (stock, fused).
        test_images: number of images behind an accuracy.
    """
    eps = torch.finfo(torch.float32).eps
    distances, fused_distances, allowed, reached = [], [], [], 0.0
    for step, (exact, own) in enumerate(zip(truth, fused, strict=False)):
        distance = max(abs(run[step] - exact) for run in stock)
        reached = max(reached, distance)
        if reached > CHAOS * abs(exact):
            break
        distances.append(distance)
        fused_distances.append(abs(own - exact))
        allowed.append(2 * reached + ROUNDINGS_OF_A_LOSS * eps * abs(exact))
    gap, chance = accuracy_tolerance(accuracies, test_images)
    return Verdict(distances, fused_distances, allowed, gap, chance)


def accuracy_tolerance(accuracies: tuple[float, float], images: int) -> tuple[float, float]:
    """(distance, three standard deviations of the difference of two such binomial shares)."""
    p = sum(accuracies) / 2
    return abs(accuracies[0] - accuracies[1]), SIGMAS * math.sqrt(2 * p * (1 - p) / images)
