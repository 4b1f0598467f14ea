"""Alternating timing: every round runs each contender once, so that noise meets all of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

#: glibc keeps freed memory instead of returning it to the system at once.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(32 << 30)}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender: median and interquartile range over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """The quartiles of a list of milliseconds."""
        low, median, high = statistics.quantiles(samples, n=4)
        return cls(median, low, high)


class Worker:
    """A process of its own that times steps; see `bench.worker`."""

    def __init__(self, kept: bool) -> None:
        environment = {**os.environ, **(KEEP if kept else {})}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).resolve().parent.parent,
        )

    def ask(self, **request: Any) -> float:
        """One answer of the process: milliseconds, or bytes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the timing process ended with {self._process.wait()}")
        return float(json.loads(line))

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()


def race(
    contenders: dict[str, tuple[Worker, str]], rounds: int, **request: Any
) -> dict[str, Timing]:
    """Time contenders in turn.

    Args:
        contenders: name of the row -> (process, what it runs).
        rounds: how often each is timed.
        request: block, mode and dtype of the step.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (worker, contender) in contenders.items():
            samples[name].append(worker.ask(what="time", contender=contender, **request))
    for worker, _ in contenders.values():
        worker.ask(what="drop", contender="", mode="", block=request["block"], dtype="float32")
    return {name: Timing.of(values) for name, values in samples.items()}
