"""A process that measures contenders on request: one JSON line in, one out.

Memory belongs to a process (glibc reads its settings at start, and a peak is a process's), so on
a CPU each contender lives in a process of its own; only one of them works at a time. On a GPU one
process holds them all: they share its allocator.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

import torch

from .contenders import Job
from .engines import export
from .gate import parity_of
from .measure import Measured, first_line, out_of_memory, roof
from .parts import block_times


class Bench:
    """Contenders by job, made when they are first asked for."""

    def __init__(self) -> None:
        self._measured: dict[Job, Measured] = {}

    def answer(self, what: str, **request: Any) -> Any:
        """What a request is answered with.

        Args:
            what: "gate" (parity), "prepare" (build, warm up, facts), "time" (milliseconds of one
                step), each with a `job`; "blocks" (milliseconds by name), with names besides;
                "export" (as ONNX), with a job and a path; "roof", with device and dtype.
        """
        if what == "roof":
            return roof(**request)
        job = Job(**request["job"])
        if what == "export":
            return export(job, request["path"])
        if what == "gate":
            torch.compiler.reset()  # another contender's graphs are not this one's
            return parity_of(job)
        with job.settings():
            if what == "blocks":
                return block_times(job, request["names"])
            if what == "time":
                return self._measured[job].milliseconds()
            self._measured[job] = Measured(job)
            return asdict(self._measured[job].facts)


def handled(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    """{"value": answer}, or {"error": "memory" or "other", "message": one line}."""
    try:
        return {"value": bench.answer(**request)}
    except Exception as error:
        if out_of_memory(error):
            return {"error": "memory", "message": first_line(error)}
        return {"error": "other", "message": f"{type(error).__name__}: {first_line(error)}"}


def main() -> None:
    """Serve requests until standard input ends."""
    # Ctrl-C reaches the whole group of processes: the one in front decides what becomes of us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print; answers stay alone
    bench = Bench()
    for line in sys.stdin:
        print(json.dumps(handled(bench, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
