"""`fastres demo`: a ResNet learns handwritten digits twice, stock and fused, and a report."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

import fastres
from fastres.cli.demo import data, network, parity
from fastres.cli.demo.report import Result, conditions, figures, page
from fastres.cli.demo.training import Contender
from fastres.cli.errors import CommandError
from fastres.cli.libraries import library
from fastres.cli.output import heading, table

BATCH = 128
#: (epochs, pixels a side, steps compared in float64, in float32) of a run, and of `--quick`.
FULL, QUICK = (9, 32, 5, 33), (1, 8, 4, 11)


def main(arguments: Sequence[str]) -> int:
    """Train, print, write the page. 0 where every claim holds, 1 where one does not."""
    args = _parser().parse_args(arguments)
    _check(args)
    demo = Demo(args)
    try:
        demo.train()
    except KeyboardInterrupt:
        if demo.result.fused.losses:
            _publish(demo.result, args.out)
        raise
    _publish(demo.result, args.out)
    return 0 if demo.result.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastres demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    parser.add_argument("--epochs", type=int, help=f"training epochs (default: {FULL[0]})")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and split")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; no accuracy is asked for"
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.epochs is not None and args.epochs < 1:
        raise CommandError(f"--epochs must be at least 1, got {args.epochs}")
    if args.seed < 0:
        raise CommandError(f"--seed must not be negative, got {args.seed}")
    if args.out.is_dir() or not args.out.resolve().parent.is_dir():
        raise CommandError(f"--out must be a file in a folder that exists, got {args.out}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise CommandError(f"--device must name a device of this machine: {reason}") from error


class Demo:
    """One run: two contenders that take turns, epoch by epoch, and the witnesses of rounding."""

    def __init__(self, args: argparse.Namespace) -> None:
        epochs, size, *compared = QUICK if args.quick else FULL
        self.epochs, self.seed = args.epochs or epochs, args.seed
        self.digits = data.load(size, self.seed)
        self.steps = len(self.digits.train_y) // BATCH
        self.exact_steps, self.steps32 = (min(n, self.epochs * self.steps) for n in compared)
        self.result = self._contenders(args, size)

    def _contenders(self, args: argparse.Namespace, size: int) -> Result:
        self.initial = network.build(self.seed).to(args.device)
        total = self.epochs * self.steps
        stock = Contender("stock", copy.deepcopy(self.initial), total)
        fused = Contender("fused", copy.deepcopy(self.initial), total)
        fastres.convert(fused.model)
        return Result(
            stock=stock,
            fused=fused,
            verdict=None,
            blocks=fastres.explain(fused.model).to_dict(),
            batch=BATCH,
            size=size,
            seed=self.seed,
            epochs=self.epochs,
            test_images=len(self.digits.test_y),
            enforce_accuracy=not args.quick,
        )

    def train(self) -> None:
        """Train everything; what is finished stays in `result` if it is interrupted."""
        result, start = self.result, time.perf_counter()
        first = next(data.batches(self.digits, BATCH, self.seed, 0))
        result.stock.measure_saved(*first)
        result.fused.measure_saved(*first)
        planned = self.epochs * self.steps
        exact = parity.Exact.of(self.initial, planned, self.seed)
        witnesses = parity.witnesses(self.initial, planned, self.seed)
        extra = 3 * self.exact_steps + len(witnesses) * self.steps32
        with _progress(2 * planned + extra) as advance:
            self._alternate(advance)
            for witness in witnesses:
                self._follow(witness, self.steps32, advance)
            for contender in exact.contenders:
                self._follow(contender, self.exact_steps, advance)
        result.verdict = parity.judge(
            exact, result.stock, result.fused, witnesses, result.test_images
        )
        result.seconds = time.perf_counter() - start

    def _alternate(self, advance: Any) -> None:
        for epoch in range(self.epochs):
            pair = [self.result.stock, self.result.fused]
            for contender in pair if epoch % 2 == 0 else reversed(pair):
                for images, labels in data.batches(self.digits, BATCH, self.seed, epoch):
                    contender.step(images, labels)
                    advance(f"{contender.name}, epoch {epoch + 1}, loss {contender.losses[-1]:.3f}")
                contender.test(self.digits.test_x, self.digits.test_y)

    def _follow(self, witness: Contender, steps: int, advance: Any) -> None:
        epochs = (data.batches(self.digits, BATCH, self.seed, e) for e in range(self.epochs))
        for images, labels in islice(chain.from_iterable(epochs), steps):
            witness.step(images, labels)
            advance(f"parity: {witness.name}")


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A progress bar; yields advance(description)."""
    rich = library("rich.progress", "rich")
    columns = (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, rich.TextColumn("{task.description}")) as bar:
        task = bar.add_task("", total=total)
        yield lambda description: bar.update(task, advance=1, description=description)


def _publish(result: Result, out: Path) -> None:
    heading("Handwritten digits, stock and fused")
    table([("", "stock", "fused", "fused / stock"), *figures(result)])
    print()
    table([("ok" if holds else "NOT MET", text) for holds, text in result.checks()])
    table([("", conditions(result))])
    out.write_text(page(result), encoding="utf-8")
    print(f"\n  {out}, after {result.seconds:.0f} s")
