"""Training from start to end: a real input pipeline, stock and fused, and what was learned.

Contenders take turns epoch by epoch, on the same batches in the same order, each with its own
clock: it runs while data is loaded and steps are made, and stands while accuracy is tested.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fastres.cli.demo import data as digits
from fastres.cli.demo.training import Contender
from fastres.cli.errors import CommandError
from fastres.cli.libraries import library

from .contenders import Job
from .interleave import FailedError, Worker
from .measure import first_line, out_of_memory
from .models import DIGITS, network
from .progress import Doing
from .results import Row, row
from .suite import settings_of, times_of

SEED = 0
#: Of an image folder without a split of its own: every fifth image is for the test.
TEST_EVERY = 5
#: ImageNet's mean and standard deviation per channel, as torchvision's recipes have them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pipeline:
    """What is learned: data sets that give (image, label), and the network to make for them."""

    train: Dataset[Any]
    test: Dataset[Any]
    build: Callable[[bool], nn.Module]

    def batches(self, size: int, epoch: int, workers: int) -> DataLoader[Any]:
        """One epoch's training batches, loaded by processes of their own; the same for all."""
        order = torch.Generator().manual_seed(1000 * SEED + epoch)
        return DataLoader(
            self.train, size, shuffle=True, drop_last=True, num_workers=workers, generator=order
        )

    def tests(self, size: int, workers: int) -> DataLoader[Any]:
        """The test images."""
        return DataLoader(self.test, size, num_workers=workers)


def pipeline(model: str | None, folder: Path | None, size: int) -> Pipeline:
    """Handwritten digits, or the images of a folder.

    Args:
        model: None takes the demo's network for digits, and resnet18 for a folder.
        folder: a folder per class in it, or in its "train" and "val".
        size: pixels per side.

    Raises:
        CommandError: where the folder is none of images, or a library is not there.
    """
    if folder is not None:
        return _images(model or "resnet18", folder, size)
    dataset = digits.load(size, SEED)
    channels = 1 if model is None else 3

    def images(x: Tensor) -> Tensor:
        return x.expand(-1, channels, -1, -1)

    return Pipeline(
        TensorDataset(images(dataset.train_x), dataset.train_y),
        TensorDataset(images(dataset.test_x), dataset.test_y),
        lambda fused: network(model or DIGITS, fused, **({"num_classes": 10} if model else {})),
    )


def _images(model: str, folder: Path, size: int) -> Pipeline:
    datasets, t = library("torchvision.datasets"), library("torchvision.transforms")
    end = [t.ToTensor(), t.Normalize(MEAN, STD)]
    train = t.Compose([t.RandomResizedCrop(size), t.RandomHorizontalFlip(), *end])
    test = t.Compose([t.Resize(round(size / 0.875)), t.CenterCrop(size), *end])
    split = (folder / "train").is_dir()
    try:
        learned = datasets.ImageFolder(folder / "train" if split else folder, train)
        held = datasets.ImageFolder(folder / "val" if split else folder, test)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"--data must be a folder with a folder of images per class: {error}"
        ) from error
    classes = len(learned.classes)
    if not split:
        places = range(len(learned))
        held = Subset(held, [i for i in places if i % TEST_EVERY == 0])
        learned = Subset(learned, [i for i in places if i % TEST_EVERY])
    return Pipeline(learned, held, lambda fused: network(model, fused, num_classes=classes))


# ---------------------------------------------------------------- the run


@dataclass
class Training:
    """One contender's training, by the clock.

    Attributes:
        steps: seconds of every step, from asking for the batch to the updated weights.
    """

    job: Job
    contender: Contender
    steps: list[float] = field(default_factory=list)

    def epoch(self, batches: DataLoader[Any]) -> Iterator[float]:
        """Train on all batches; yields every step's loss."""
        start = time.perf_counter()
        for images, labels in batches:
            with self.job.settings(), self.job.autocast():
                self.contender.step(images, labels)
            end = time.perf_counter()
            self.steps.append(end - start)
            start = end
            yield self.contender.losses[-1]

    def test(self, batches: DataLoader[Any]) -> None:
        """Record the accuracy."""
        right = total = 0
        for images, labels in batches:
            with self.job.settings(), self.job.autocast():
                right += self.contender.right(images, labels)
            total += len(labels)
        self.contender.accuracies.append(right / total)

    def curve(self) -> dict[str, list[float]]:
        """For the result: seconds and loss at every step, accuracy after every epoch."""
        seconds = [round(s, 4) for s in accumulate(self.steps)]
        return {
            "seconds": seconds,
            "loss": self.contender.losses[: len(seconds)],
            "accuracy": self.contender.accuracies,
        }

    def row(self, subject: str, parity: str, workers: int) -> Row:
        """What the whole run comes to."""
        settings = settings_of(self.job)
        accuracies = self.contender.accuracies
        if not self.steps:
            return row("train", subject, self.job.contender, **settings, parity=parity)
        seconds, images = sum(self.steps), self.job.batch * len(self.steps)
        learned = f"accuracy {accuracies[-1]:.2%}, " if accuracies else ""
        return row(
            "train", subject, self.job.contender, **settings,
            **times_of([1e3 * s for s in self.steps]), images_per_s=images / seconds,
            saved_bytes=self.contender.saved_bytes or None, parity=parity,
            note=f"{learned}loss {statistics.mean(self.contender.losses[-5:]):.3f} "
            f"after epoch {len(accuracies)}; {workers} processes load",
        )  # fmt: skip


@dataclass
class Course:
    """One run: all contenders on one pipeline. `rows` and `curves` can be asked for at any time."""

    base: Job
    names: Sequence[str]
    data: Pipeline
    epochs: int
    workers: int
    subject: str
    say: Callable[[str], None]
    doing: Doing
    trainings: dict[str, Training] = field(default_factory=dict)
    _parities: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """A row per contender that was judged."""
        jobs = {name: self._job(name) for name in self._parities}
        empty = {n: Training(j, None) for n, j in jobs.items()}  # type: ignore[arg-type]
        return [
            (self.trainings.get(name) or empty[name]).row(self.subject, parity, self.workers)
            for name, parity in self._parities.items()
        ]

    @property
    def curves(self) -> dict[str, dict[str, list[float]]]:
        """By contender."""
        return {name: each.curve() for name, each in self.trainings.items() if each.steps}

    def run(self) -> None:
        """Judge, and train who passed; with half the batch where memory does not suffice."""
        self._judge()
        while True:
            try:
                return self._train()
            except Exception as error:
                if not out_of_memory(error) or self.base.batch == 1:
                    raise
                self.trainings.clear()
                batch = self.base.batch // 2
                self.say(f"out of memory ({first_line(error)}); batch {self.base.batch} -> {batch}")
                self.base = replace(self.base, batch=batch)

    def _train(self) -> None:
        batch = self.base.batch
        steps = len(self.data.batches(batch, 0, 0))
        if not steps:
            raise CommandError(f"--batch-size must be at most the training images, got {batch}")
        for name, parity in self._parities.items():
            if parity == "ok":
                self.trainings[name] = self._training(name, self.epochs * steps)
        for epoch in range(self.epochs):
            order = list(self.trainings.items())
            turns = order if epoch % 2 == 0 else order[::-1]
            for turn, (name, each) in enumerate(turns):
                done = (epoch + turn / len(turns)) / self.epochs
                for loss in each.epoch(self.data.batches(batch, epoch, self.workers)):
                    self.doing(f"{name}, epoch {epoch + 1} of {self.epochs}, loss {loss:.3f}", done)
                each.test(self.data.tests(batch, self.workers))

    def _job(self, name: str) -> Job:
        return replace(self.base, contender=name)

    def _judge(self) -> None:
        with Worker() as worker:
            for name in self.names:
                self.doing(f"parity of {name}")
                try:
                    parity = worker.ask(what="gate", job=asdict(self._job(name)))
                except FailedError as error:
                    parity = f"failed: {error}"
                self._parities[name] = parity

    def _training(self, name: str, total: int) -> Training:
        job = self._job(name)
        model = self.data.build(job.who.fused).to(job.device)
        contender = Contender(
            name, model, total, dtype=job.parameter_dtype, memory_format=job.memory_format
        )
        images, labels = next(iter(self.data.batches(job.batch, 0, 0)))
        with job.settings(), job.autocast():
            contender.measure_saved(images, labels)
        if job.who.compiled is not None:
            model.compile(mode=job.who.compiled)
        return Training(job, contender)
