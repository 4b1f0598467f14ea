"""`fastres bench`: speed and memory beside stock PyTorch, on the machine at hand.

Before a contender is timed, its numbers are held to stock PyTorch's; what differs gets no speed.
Contenders alternate round by round; medians and quartiles are shown, losses like wins. Under
torchrun, `model` measures all processes together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from fastres.cli.errors import CommandError

from . import distributed, registry, results
from .arguments import MODES, OTHERS, parse, shown
from .comparison import is_ours
from .conditions import conditions
from .contenders import CONTENDERS, KEPT, Job, why_not
from .interleave import FailedError
from .models import DIGITS, PARTS, Subject, find
from .progress import Doing, progress
from .suite import Suite
from .training import Course, pipeline

#: Of a table that goes into a file.
WIDTH = 120


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and keep the result; 1 where nothing was timed, or a kernel of ours is wrong.

    Raises:
        CommandError: for input that cannot be used.
        KeyboardInterrupt: after Ctrl-C, once what was finished is written.
    """
    if arguments and arguments[0] in OTHERS:
        status: int = import_module(f".{arguments[0]}", __package__).main(arguments[1:])
        return status
    return Session(parse(arguments), arguments).run()


class Session:
    """One run of a command: what is said on the way, and what is kept in the end.

    `found` is the result so far: its rows, the machine's peaks, and curves.
    """

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.options = options
        self.command = " ".join(["fastres bench", *arguments])
        self.facts: dict[str, Any] = {"rows": [], "machine": {}}
        # Everything but the table goes to stderr: the table can be piped.
        quiet = not distributed.leads()
        self.log = Console(stderr=True, highlight=False, quiet=quiet)
        self.console = Console(highlight=False, quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = WIDTH

    def run(self) -> int:
        """Measure; then, and also where that ends before its time, print and write what there is.

        Raises:
            CommandError: where a measuring process failed in the middle.
            KeyboardInterrupt: after Ctrl-C.
        """
        try:
            with progress(self.log) as doing:
                getattr(self, f"_{self.options.kind}")(doing)
        except (KeyboardInterrupt, FailedError, CommandError) as stop:
            if self.facts["rows"]:
                self._publish("interrupted; ")
            if isinstance(stop, FailedError):
                raise CommandError(f"the measurement failed: {stop}") from stop
            raise
        self._publish()
        rows = self.facts["rows"]
        kernels = self.options.kind == "kernel"
        wrong = any(results.failed(one) for one in rows if kernels or is_ours(one))
        return int(wrong or not any(one["ms"] for one in rows))

    def say(self, sentence: str) -> None:
        """Tell the user something that stays on the screen."""
        self.log.print(Text(sentence), soft_wrap=True)

    # ------------------------------------------------------------ the kinds

    def _kernel(self, doing: Doing) -> None:
        options = self.options
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        backend = None if options.backend == "auto" else options.backend
        with registry.timer_for(options.device) as timer:
            run = registry.Run(
                options.device, options.quick, timer, options.rounds, options.batch_size, dtype,
                doing,
            )  # fmt: skip
            self.facts["rows"] = run.rows
            chosen = [options.primitive] if options.primitive else registry.MEMORY_BOUND
            for i, primitive in enumerate(chosen):
                doing(primitive, i / len(chosen))
                run.primitive(primitive, registry.entries_of(primitive, backend))
        for what, reasons in run.declined.items():
            self.say(f"declined: {what}: {'; '.join(reasons)}")

    def _conv(self, doing: Doing) -> None:
        self._parts(doing)

    def _block(self, doing: Doing) -> None:
        self._parts(doing)

    def _parts(self, doing: Doing) -> None:
        """All of a network's parts of the kind; quick, the first and the last."""
        options = self.options
        names = [*PARTS[options.kind]]
        names = names[:: len(names) - 1] if options.quick else names
        sizes = options.batch_size, options.img_size
        self._time(doing, [Subject(options.kind, name, *sizes) for name in names])

    def _model(self, doing: Doing) -> None:
        options = self.options
        name = options.model or "resnet50"
        source, plain = find(name)
        self.say(f"{plain} of {'fastres.models' if source == 'fastres' else source}")
        if distributed.active():
            base = self._base(name=name, batch=options.batch_size, size=options.img_size)
            names = self._contenders(("train",))
            self.facts["rows"] += distributed.rows(base, names, options.rounds, self.say)
            return
        self._time(doing, [Subject("model", name, options.batch_size, options.img_size)])

    def _time(self, doing: Doing, subjects: Sequence[Subject]) -> None:
        modes = MODES[self.options.mode]
        names = self._contenders(modes)
        if self.options.kept and self.options.device == "cpu" and not self.options.quick:
            names += [name + KEPT for name in names]
        suite = Suite(self._base(), names, self.options.rounds, self.say, doing)
        self.facts |= {"rows": suite.rows, "machine": suite.machine, "layers": suite.layers}
        suite.run(subjects, modes)

    def _train(self, doing: Doing) -> None:
        options = self.options
        data = pipeline(options.model, options.data, options.img_size)
        name = options.model or (DIGITS if options.data is None else "resnet18")
        base = self._base(name=name, batch=options.batch_size, size=options.img_size)
        course = Course(
            base, self._contenders(("train",)), data, options.epochs, options.workers,
            name, self.say, doing,
        )  # fmt: skip
        try:
            course.run()
        finally:
            self.facts |= {"rows": course.rows, "curves": course.curves}

    def _base(self, **more: Any) -> Job:
        """What all jobs share."""
        options = self.options
        subject = {"name": "", "batch": 0, "size": 0} | more
        settings = ("dtype", "amp", "channels_last", "backend", "memory", "level", "device")
        chosen = {name: getattr(options, name) for name in settings}
        return Job(kind=options.kind, contender="", **subject, **chosen)

    def _contenders(self, modes: Sequence[str]) -> list[str]:
        """What was asked for and can run in one of the modes, and fastres.

        What cannot, or in one of them not, is named with the reason.
        """
        able: list[str] = []
        absent: dict[str, str] = {}
        for name in dict.fromkeys([*self.options.against, "fastres"]):
            jobs = [replace(self._base(), contender=name, mode=mode) for mode in modes]
            reasons = {job.mode: why for job in jobs if (why := why_not(job))}
            if len(reasons) < len(modes):
                able.append(name)
            if reasons:
                where = f"{name} in {' and '.join(reasons)}" if name in able else name
                absent[where] = "; ".join(dict.fromkeys(reasons.values()))
                self.say(f"absent: {where}: {absent[where]}")
        if absent:
            self.facts["absent"] = "; ".join(f"{name}: {why}" for name, why in absent.items())
        return able

    # ------------------------------------------------------------ what is kept

    def _publish(self, how: str = "") -> None:
        rows = results.with_speedups(self.facts["rows"])
        if not distributed.leads():
            return
        if not rows:
            self.say(f"{how}nothing was measured, nothing is written")
            return
        self.console.print(results.table(rows))
        if self.options.csv is not None:
            self.say(f"{how}rows written to {results.write_csv(rows, self.options.csv)}")
        if self.options.writes:
            self._write(rows, how)
        else:
            self.say(f"{how}quick: a smoke test and not a measurement; no result is written")

    def _write(self, rows: list[results.Row], how: str) -> None:
        ran = (CONTENDERS.get(one["contender"]) for one in rows if one["ms"])
        packages = dict.fromkeys(name for who in ran if who for name in who.packages)
        where = conditions(self.options.device, packages)
        subjects = {one["subject"] for one in rows}
        name = results.name_of(
            where, self.options.kind, subjects.pop() if len(subjects) == 1 else ""
        )
        header = {key: value for key, value in self.facts.items() if key != "machine"}
        result = {**where, "command": self.command, **self.facts["machine"], **header, "rows": rows}
        path = results.write(result, self.options.out, name)
        self.say(f"{how}written to {shown(path)}")
        if self.options.report:
            self._report(result, path.stem)

    def _report(self, result: dict[str, Any], name: str) -> None:
        try:
            report = import_module(".report", __package__)
        except ImportError as error:
            self.say(f"no report: {error}")
            return
        self.say(f"report in {shown(report.write_report(result, self.options.out, name))}")
