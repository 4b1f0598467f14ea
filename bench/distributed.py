"""Under torchrun: the training step of every process together, and how it scales from one.

One process is measured first, alone, then all of them under DistributedDataParallel, in the same
run. Each has a batch of its own; a step takes as long as its slowest process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .contenders import Job
from .gate import parity_of
from .interleave import alternate
from .measure import MOST_WARM_UPS, Run, steady, step_of
from .results import Row, row
from .suite import settings_of, times_of

#: A process waits for as long as the first one measures alone.
PATIENCE = timedelta(hours=2)

Say = Callable[[str], None]


def active() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process speaks and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def group(device: str) -> Iterator[int]:
    """The processes as a group; yields how many they are."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield dist.get_world_size()
        # One that leaves while another still talks to it can take that one down with it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def rows(base: Job, names: Sequence[str], rounds: int, say: Say) -> list[Row]:
    """A row per contender for one process, and one for all of them; the same on every process.

    Args:
        base: what all jobs share; its batch is each process's own.
        names: the contenders.
        rounds: how often each is timed.
        say: is told what goes on.
    """
    with group(base.device) as world:
        jobs = {name: replace(base, contender=name) for name in names}
        parities = _agreed({name: parity_of(job) if leads() else "" for name, job in jobs.items()})
        able = {name: job for name, job in jobs.items() if parities[name] == "ok"}
        say(f"one process alone, then {world} of {base.batch} images each")
        alone = _agreed(_time(able, rounds, together=False) if leads() else {})
        together = _time(able, rounds, together=True)
        results = [_row(job, alone.get(n, []), 1, parities[n]) for n, job in jobs.items()]
        for name, job in jobs.items():
            results.append(_row(job, together.get(name, []), world, parities[name]))
            _add_efficiency(results[-1], results[len(results) - 1 - len(jobs)], world)
    return results


def _agreed(value: Any) -> Any:
    """The first process's value, on all."""
    boxed = [value]
    dist.broadcast_object_list(boxed)
    return boxed[0]


def _time(jobs: dict[str, Job], rounds: int, together: bool) -> dict[str, list[float]]:
    steps = {name: _step(job, together) for name, job in jobs.items()}
    for step in steps.values():
        times: list[float] = []
        while len(times) < MOST_WARM_UPS and not steady(times):
            times.append(step())
    return alternate(steps, rounds)


def _step(job: Job, together: bool) -> Callable[[], float]:
    """Milliseconds of a step; of the slowest process where they work together."""
    module = job.module()
    x = job.place(job.subject.input(seed=dist.get_rank()))
    wrapped: nn.Module = DistributedDataParallel(module) if together else module
    return partial(_milliseconds, job, step_of(job, wrapped, x), x, together)


def _milliseconds(job: Job, run: Run, x: torch.Tensor, together: bool) -> float:
    if together:
        dist.barrier()
    start = time.perf_counter()
    with job.settings():
        run(x)
    if job.device == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor([(time.perf_counter() - start) * 1e3], device=job.device)
    if together:
        dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def _row(job: Job, times: list[float], processes: int, parity: str) -> Row:
    settings = settings_of(replace(job, batch=job.batch * processes))
    name = job.contender if processes == 1 else f"{job.contender}, {processes} processes"
    timed = times_of(times) if times else {}
    return row(job.kind, job.subject.label, name, **settings, **timed, parity=parity)


def _add_efficiency(all_of_them: Row, one: Row, processes: int) -> None:
    """How much of so many times the speed of one process is reached."""
    if all_of_them["images_per_s"] and one["images_per_s"]:
        share = all_of_them["images_per_s"] / (processes * one["images_per_s"])
        all_of_them["note"] = f"scaling efficiency {share:.0%} over {processes} processes"
