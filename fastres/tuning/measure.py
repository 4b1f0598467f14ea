"""Measuring: the candidates take turns on the GPU, and the lowest median wins."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from fastres.tuning.store import Choice

T = TypeVar("T")

#: Launches once.
Thunk = Callable[[], object]

#: Launches once, and says how many milliseconds that took on the device.
Timer = Callable[[Thunk], float]

#: Given all candidates before the first is launched: say, to compile them side by side.
Prepare = Callable[[Sequence[Thunk]], None]

#: Launches before anything counts: the first may compile and load, the second warms the caches.
WARM_UPS = 2

#: How often each candidate is measured; after the first rounds only while it has a chance.
ROUNDS = 15
FIRST_ROUNDS = 3
CLEARLY_SLOWER = 1.5

#: What is overwritten before a launch, so that it finds the L2 cache without its operands: twice
#: the cache, and at least this much, for memory-side caches that are not reported as L2. Several
#: times, since the GPU is then still busy while the host queues the launch: the events around it
#: see the kernel, not the host. Read in the end, or the launch would pay for writing it back.
FLUSH_BYTES = 128 * 2**20
FLUSHES = 8

_log = logging.getLogger("fastres.tuning")


@contextmanager
def gpu_timer(device: torch.device) -> Iterator[Timer]:
    """A timer by GPU events, on the current stream of a device, with a cold L2 cache.

    Raises:
        torch.OutOfMemoryError: where there is no room for the buffer that empties the cache.
    """
    with torch.cuda.device(device):
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, FLUSH_BYTES)
        buffer = torch.empty(size // 4, dtype=torch.int32, device=device)
        most = torch.empty((), dtype=torch.int32, device=device)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)

        def milliseconds(thunk: Thunk) -> float:
            for _ in range(FLUSHES):
                buffer.zero_()
            torch.amax(buffer, dim=0, out=most)
            start.record()
            thunk()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

        yield milliseconds


@dataclass
class _Runner:
    """A candidate that can run, and its times so far."""

    name: str
    thunk: Thunk
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def fastest(
    candidates: Mapping[str, T],
    run: Callable[[T], Thunk],
    device: torch.device,
    prepare: Prepare | None = None,
) -> Choice | None:
    """The fastest of some candidates; of equal ones the first.

    Args:
        candidates: by name.
        run: prepares a candidate, which is not timed, and returns what launches it once.
        device: the GPU they run on.
        prepare: see `Prepare`.

    Returns:
        The choice, with the median milliseconds of every candidate that ran; or None where none
        could.
    """
    try:
        with gpu_timer(device) as time:
            prepared = [_prepared(name, candidate, run) for name, candidate in candidates.items()]
            runners = [runner for runner in prepared if runner is not None]
            if prepare is not None:
                prepare([runner.thunk for runner in runners])
            runners = [runner for runner in runners if _warm(runner, time)]
            finalists = _rounds(runners, time)
    except torch.OutOfMemoryError as error:
        _log.debug("nothing is measured, there is no memory to do it: %s", error)
        return None
    if not finalists:
        return None
    best = min(finalists, key=lambda runner: runner.median)
    return Choice(best.name, {r.name: r.median for r in runners if r.times})


def _prepared(name: str, candidate: T, run: Callable[[T], Thunk]) -> _Runner | None:
    """A candidate with what launches it; None, and a line in the log, for one that fails."""
    try:
        return _Runner(name, run(candidate))
    except torch.OutOfMemoryError:
        raise  # says nothing about the candidate: nobody is measured
    except Exception as error:  # Triton's own errors derive from nothing more special
        _skipped(name, error)
        return None


def _warm(runner: _Runner, time: Timer) -> bool:
    """Launch a candidate until times count; False for one that fails."""
    for _ in range(WARM_UPS):
        if not _measured(runner, time):
            return False
    runner.times.clear()
    return True


def _rounds(runners: list[_Runner], time: Timer) -> list[_Runner]:
    """Measure in turn; who remains at the end."""
    for done in range(1, ROUNDS + 1):
        runners = [runner for runner in runners if _measured(runner, time)]
        if done >= FIRST_ROUNDS and runners:
            limit = CLEARLY_SLOWER * min(runner.median for runner in runners)
            runners = [runner for runner in runners if runner.median <= limit]
            if len(runners) == 1:
                break
    return runners


def _measured(runner: _Runner, time: Timer) -> bool:
    """Add one time; False, and a line in the log, for a candidate that fails."""
    try:
        runner.times.append(time(runner.thunk))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        runner.times.clear()
        _skipped(runner.name, error)
        return False
    return True


def _skipped(name: str, error: Exception) -> None:
    """A candidate that asks for more than the device has is an everyday thing; others are not."""
    kind = type(error).__name__
    level = logging.DEBUG if "OutOfResources" in kind else logging.WARNING
    _log.log(level, "candidate %s is skipped: %s: %s", name, kind, error)
