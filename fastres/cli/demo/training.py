"""One contender's training: its network, its optimizer, and what is recorded on the way."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres.testing import saved_bytes

#: The learning rate rises over the first quarter of the steps and falls over the rest.
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, WARM_UP = 0.5, 0.9, 5e-4, 0.25


@dataclass
class Contender:
    """A network in training; `total` is the number of steps that the learning rate is planned for.

    Attributes:
        losses: training loss of every step.
        seconds: wall time of every step, forward, backward and update.
        accuracies: share of the test images that are right, after every epoch.
        saved_bytes: what one step keeps for its backward, each storage once.
    """

    name: str
    model: nn.Module
    total: int
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    saved_bytes: int = 0

    def __post_init__(self) -> None:
        self.model.to(dtype=self.dtype, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.device = next(self.model.parameters()).device
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, self.total, pct_start=WARM_UP, cycle_momentum=False
        )

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One training step, recorded."""
        images, labels = self._place(images), labels.to(self.device)
        self._wait()
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._wait()
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.losses.append(loss.item())

    def test(self, images: Tensor, labels: Tensor) -> None:
        """Record the accuracy on the test images."""
        self.accuracies.append(self.right(images, labels) / len(labels))

    def right(self, images: Tensor, labels: Tensor) -> int:
        """How many images are classified right, in eval mode."""
        self.model.eval()
        with torch.no_grad():
            found = self.model(self._place(images)).argmax(1).cpu()
        self.model.train()
        return int((found == labels).sum())

    def images_per_second(self, batch: int) -> float:
        """From the median step; the medians of alternating contenders see the same machine."""
        return batch / statistics.median(self.seconds)

    def measure_saved(self, images: Tensor, labels: Tensor) -> None:
        """Count what a step keeps for backward, without parameters; the model stays as it was."""
        model = copy.deepcopy(self.model)
        images, labels = self._place(images), labels.to(self.device)
        self.saved_bytes = saved_bytes(model, lambda: F.cross_entropy(model(images), labels))

    def _place(self, images: Tensor) -> Tensor:
        return images.to(self.device, self.dtype, memory_format=self.memory_format)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
