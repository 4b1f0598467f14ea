"""Interleaved timing: every round runs each contender once, so that noise meets all of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

#: glibc keeps freed memory instead of returning it to the system at once.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(32 << 30)}

#: What a process is killed with where the machine has no memory left.
_KILLED = -9


class NoMemoryError(Exception):
    """A contender does not fit."""


class FailedError(Exception):
    """A contender cannot run, for a reason that has nothing to do with memory."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender: median and interquartile range over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """The quartiles of a list of milliseconds; of a single one, itself."""
        if len(samples) == 1:
            return cls(*samples * 3)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during the rounds; `samples` has those that were complete, of every contender."""

    def __init__(self, samples: dict[str, list[float]]) -> None:
        super().__init__()
        self.samples = samples


def alternate(
    contenders: Mapping[str, Callable[[], float]], rounds: int,
    begins: Callable[[int], object] = lambda number: None,
) -> dict[str, list[float]]:  # fmt: skip
    """Milliseconds of every contender, one per round, each round in the same order.

    `begins` is told the number of each round, from 1.

    Raises:
        Interrupted: after Ctrl-C, with the complete rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    done = 0
    try:
        while done < rounds:
            begins(done + 1)
            for name, milliseconds in contenders.items():
                samples[name].append(milliseconds())
            done += 1
    except KeyboardInterrupt:
        raise Interrupted({name: times[:done] for name, times in samples.items()}) from None
    return samples


class Worker:
    """A process of its own that measures; see `bench.worker`."""

    def __init__(self, kept: bool = False) -> None:
        environment = {**os.environ, **(KEEP if kept else {})}
        self._stderr = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (closed in __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment,
            # The folder of the package, where that is a checkout and not installed.
            cwd=Path(__file__).resolve().parents[1] if __package__ == "bench" else None,
        )

    def ask(self, **request: Any) -> Any:
        """One answer of the process.

        Raises:
            NoMemoryError: where there was not enough for it.
            FailedError: where it failed for another reason, with that.
        """
        answer = self._exchange(json.dumps(request))
        if "value" in answer:
            return answer["value"]
        raise (NoMemoryError if answer["error"] == "memory" else FailedError)(answer["message"])

    def _exchange(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            return self._failure()
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _failure(self) -> dict[str, Any]:
        status = self._process.wait()
        self._stderr.seek(0)
        last = (self._stderr.read().strip().splitlines() or ["it said nothing"])[-1]
        message = f"the process ended with status {status}: {last}"
        return {"error": "memory" if status == _KILLED else "other", "message": message}

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
        self._stderr.close()
