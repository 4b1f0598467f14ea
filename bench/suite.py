"""The measurement of networks and blocks: gate, preparation, alternating rounds, rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

from fastres.kernels import preference

from .bounds import Bounds
from .contenders import KEPT, Job, why_not
from .gate import CANNOT
from .interleave import FailedError, Interrupted, NoMemoryError, Timing, Worker, alternate
from .models import Subject
from .progress import Doing
from .results import Row, row


@dataclass
class Suite:
    """One run over subjects and modes.

    Attributes:
        base: what all jobs share; subject, mode and contender are replaced.
        names: the contenders, in the order of the rows; in each mode, those that can run in it.
        rounds: how often each is timed.
        say: tells the user a sentence.
        doing: shows what goes on now.
        rows: what is finished.
        machine: bandwidth and arithmetic peak, the best that the run has seen so far.
        layers: what each block of a network takes, by fastres and by the fastest stock torch.
    """

    base: Job
    names: Sequence[str]
    rounds: int
    say: Callable[[str], None]
    doing: Doing
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, float] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    _exports: str = ""
    _parities: dict[Job, str] = field(default_factory=dict)
    _row_builders: list[Callable[[], list[Row]]] = field(default_factory=list)
    _bounds: list[tuple[dict[str, Any], Callable[[], float]]] = field(default_factory=list)

    def run(self, subjects: Sequence[Subject], modes: Sequence[str]) -> None:
        """Measure everything; in the end `rows` has what was finished, also after Ctrl-C."""
        try:
            with TemporaryDirectory(prefix="fastres-bench-") as self._exports:
                for i, (subject, mode) in enumerate(product(subjects, modes)):
                    self.doing(f"{subject.label}, {mode}", i / (len(subjects) * len(modes)))
                    self._look_at_machine()
                    self._subject(subject, mode)
            self._look_at_machine()
        finally:
            # All are held to the same bound, the best that the whole run has seen.
            self.rows[:] = [one for rows in self._row_builders for one in rows()]
            for layer, bound in self._bounds:
                layer["bound_ms"] = bound()

    def _subject(self, subject: Subject, mode: str) -> None:
        """All contenders on one subject, with half the batch where memory does not suffice."""
        job = replace(
            self.base, kind=subject.kind, name=subject.name, batch=subject.batch,
            size=subject.size, mode=mode, exports=self._exports,
        )  # fmt: skip
        names = [name for name in self.names if why_not(replace(job, contender=name)) is None]
        note, batch = None, subject.batch
        while batch:
            job = replace(job, batch=batch)
            try:
                with self._workers(names) as workers:
                    return self._time(job, workers, note)
            except NoMemoryError as error:
                batch //= 2
                note = f"batch halved from {subject.batch}, out of memory"
                then = f"batch {job.batch} -> {batch}" if batch else "not even one image fits"
                self.say(f"{subject.label}, {mode}: out of memory ({error}); {then}")
        jobs = [replace(job, contender=name) for name in names]
        none = [
            row(job.kind, subject.label, each.plain, **settings_of(each), note="out of memory")
            for each in jobs
        ]
        self._row_builders.append(lambda: none)

    def _look_at_machine(self) -> None:
        """A machine's speed comes and goes: what bounds a time is the best of the whole run.

        While no contender holds memory. A GPU's, whose clocks are its own, is looked at once.
        """
        if self.machine and self.base.device == "cuda":
            return
        self.doing("what the machine can do")
        dtype = str(self.base.compute_dtype).removeprefix("torch.")
        with Worker() as worker:
            roof = worker.ask(what="roof", device=self.base.device, dtype=dtype)
        for name, value in roof.items():
            self.machine[name] = max(value, self.machine.get(name, 0.0))

    @contextmanager
    def _workers(self, names: Sequence[str]) -> Iterator[dict[str, Worker]]:
        """A process per contender on a CPU; one for all on a GPU."""
        with ExitStack() as stack:
            if self.base.device == "cuda":
                yield dict.fromkeys(names, stack.enter_context(Worker()))
            else:
                yield {n: stack.enter_context(Worker(n.endswith(KEPT))) for n in names}

    # ------------------------------------------------------------ one subject, one mode

    def _time(self, job: Job, workers: dict[str, Worker], note: str | None) -> None:
        jobs = {name: replace(job, contender=name) for name in workers}
        parities = self._gate(jobs)
        facts: dict[str, dict[str, Any]]
        facts = {n: {"error": said} for n, said in parities.items() if said.startswith(CANNOT)}
        for name in (n for n in jobs if parities[n] == "ok"):
            self.doing(f"{job.subject.label}, {job.mode}: {name} warms up")
            facts[name] = self._prepared(workers[name], jobs[name])
        able = [name for name, fact in facts.items() if fact.get("error") is None]
        steps = {n: partial(workers[n].ask, what="time", job=asdict(jobs[n])) for n in able}
        rows = _Rows(jobs, parities, facts, note, Bounds.of(job, self.machine))
        try:
            samples = alternate(steps, self.rounds, partial(self._round, job))
        except Interrupted as stop:
            if able and len(stop.samples[able[0]]) > 1:
                self._row_builders.append(partial(rows, stop.samples))
            raise KeyboardInterrupt from None
        self._row_builders.append(partial(rows, samples))
        if job.kind == "model" and not self.layers:
            self._layers({name: jobs[name] for name in able}, rows)

    def _round(self, job: Job, number: int) -> None:
        self.doing(f"{job.subject.label}, {job.mode}: round {number} of {self.rounds}")

    def _layers(self, jobs: dict[str, Job], made: _Rows) -> None:
        """The blocks one by one, of stock torch and fastres, in their own processes in turn."""
        stock = next((n for n in ("channels_last", "eager") if n in jobs), None)
        names = made.bounds.blocks
        for name in filter(jobs.__contains__, (stock, "fastres")) if names else ():
            job, level = jobs[name], made.facts[name]["level"]
            self.doing(f"{job.subject.label}, {job.mode}: the blocks of {name}")
            with Worker() as worker:
                layers = worker.ask(what="blocks", job=asdict(job), names=names)
            for block, ms in layers.items():
                bound = partial(made.bounds.of_block, job, level, block)
                layer = {"name": block, "contender": name, "mode": job.mode, "ms": ms}
                self.layers.append(layer)
                self._bounds.append((layer, bound))

    def _gate(self, jobs: dict[str, Job]) -> dict[str, str]:
        """Parity of every contender, found out in a process that is then thrown away."""
        parities: dict[str, str] = {}
        with Worker() as worker:
            for name, job in jobs.items():
                key = replace(job, contender=job.plain, batch=0)
                if key not in self._parities:
                    self.doing(f"{job.subject.label}, {job.mode}: parity of {key.contender}")
                    self._parities[key] = self._parity(worker, replace(key, batch=job.batch))
                parities[name] = self._parities[key]
        return parities

    def _parity(self, worker: Worker, job: Job) -> str:
        try:
            parity: str = worker.ask(what="gate", job=asdict(job))
        except FailedError as error:
            parity = f"failed: {error}"
        if parity != "ok":
            said = parity if parity.startswith(CANNOT) else f"parity {parity}"
            self.say(f"{job.subject.label}, {job.mode}, {job.contender}: {said}")
        return parity

    def _prepared(self, worker: Worker, job: Job) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = worker.ask(what="prepare", job=asdict(job))
        except FailedError as error:
            self.say(f"{job.subject.label}, {job.mode}, {job.contender}: {CANNOT}{error}")
            return {"error": f"{CANNOT}{error}"}
        return facts


@dataclass
class _Rows:
    """Makes the rows of one subject and mode out of what is known of each contender."""

    jobs: dict[str, Job]
    parities: dict[str, str]
    facts: dict[str, dict[str, Any]]
    note: str | None
    bounds: Bounds

    def __call__(self, samples: dict[str, list[float]]) -> list[Row]:
        return [self._row(name, job, samples.get(name, [])) for name, job in self.jobs.items()]

    def _row(self, name: str, job: Job, times: list[float]) -> Row:
        facts = self.facts.get(name, {})
        notes = (self.note, facts.get("error"), facts.get("note"))
        parity = None if self.parities[name].startswith(CANNOT) else self.parities[name]
        return row(
            job.kind, job.subject.label, job.plain, **settings_of(job, facts.get("level")),
            **(times_of(times) if times else {}),
            **self.bounds.of_contender(job, facts.get("level")),
            peak_bytes=facts.get("peak_bytes"), saved_bytes=facts.get("saved_bytes"),
            parity=parity, note="; ".join(filter(None, notes)) or None,
        )  # fmt: skip


def settings_of(job: Job, level: str | None = None) -> dict[str, Any]:
    """What a row says of how a job ran; `level` is the one that fastres chose."""
    chosen: dict[str, Any] = dict.fromkeys(("backend", "memory", "level"))
    if job.who.fused:
        backend = preference(job.backend, job.device)[0]
        chosen = {"backend": backend, "memory": job.memory, "level": level}
    return {
        "mode": job.mode, "batch": job.batch, "size": job.subject.pixels,
        "dtype": str(job.compute_dtype).removeprefix("torch."), "amp": job.amp,
        "layout": "nhwc" if job.nhwc else "nchw", "device": job.device,
        "allocator": "kept" if job.kept else None, **chosen,
    }  # fmt: skip


def times_of(samples: list[float]) -> dict[str, Any]:
    """Median, quartiles and number of a contender's times, as rows have them."""
    timing = Timing.of(samples)
    return {
        "ms": round(timing.median, 4), "low": round(timing.low, 4),
        "high": round(timing.high, 4), "rounds": len(samples),
    }  # fmt: skip
