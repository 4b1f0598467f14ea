"""`make gpu-check`: everything that a GPU can tell, in stages, within nine minutes.

Each stage is a few commands, what needs nothing compiled first. A command has a share of the time,
and is stopped where it takes more, once it has written what it has. Nine minutes for everything are
for a machine whose autotuner knows the answers; on a new one, stages run alone
(`STAGE="build|parity"`, `STAGE=train`) and have all the time. What a command prints goes to a log,
its results to bench/results; the table at the end says how each ended. `DRY=1` goes through all
stages on a machine without a GPU, on the CPU and on tiny sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

#: What all that is asked for may take, where nothing else is said.
TOTAL_SECONDS = 540
#: What a command that ran out of time may take to write what it has.
GRACE_SECONDS = 10
PYTEST = "-m pytest -q -p no:cacheprovider"


@dataclass(frozen=True)
class Command:
    """A line to run, its share of the time, and what it finds in its environment."""

    line: str
    share: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    stage: str
    command: Command
    status: str
    seconds: float
    log: Path


def _python(arguments: str) -> str:
    return f"{shlex.quote(sys.executable)} {arguments}"


def _emulated() -> dict[str, str]:
    """The environment in which the CUDA kernels run on the CPU, under sanitizers."""
    command = [sys.executable, "tests/cuda_emulation/build.py", "--environment"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


# ---------------------------------------------------------------- the stages


def _build(dry: bool) -> list[Command]:
    doctor = Command(_python("-m fastres.cli doctor"), 0.2)
    if dry:
        return [doctor]
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    environment = {"FASTRES_CUDA": "1", "FASTRES_CUDA_ARCHS": arch, "FASTRES_CPU": "0"}
    environment["NVCC_APPEND_FLAGS"] = ""  # what another compiler warns of is no reason to stop
    install = "-m pip install -q --no-build-isolation --no-deps -e ."
    return [Command(_python(install), 2, environment), doctor]


def _parity(dry: bool) -> list[Command]:
    if dry:
        one = "tests/cuda_backend/test_cuda_primitives.py -k 'empty or wrong_tiling'"
        return [Command(_python(f"{PYTEST} {one}"), 1, _emulated())]
    # cuda's kernels first: Triton's take minutes to compile when they are new.
    return [
        Command(_python(f"{PYTEST} -m gpu -n 12 tests/cuda_backend"), 2),
        Command(_python(f"{PYTEST} -m gpu -n 12 tests/triton_backend"), 4),
    ]


def _sanitize(dry: bool) -> list[Command]:
    file = "tests/cuda_backend/test_cuda_primitives.py"
    every = f"{file} -k 'every_case and normal-2x3x5x7-f32-nhwc'"
    few = f"{file} -k '(channel_blocks_give and not large) or (views and 1-dtype0)'"
    if dry:
        return [Command(_python(f"{PYTEST} {few}"), 1, _emulated())]
    run = "compute-sanitizer --error-exitcode 1 --target-processes all --tool"
    # Without torch's cache an access beyond a tensor is one beyond its memory. No initcheck: the
    # tests fill new memory with NaN, which it takes for initialised.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Command(f"{run} racecheck {_python(f'{PYTEST} {few}')}", 1, environment),
        Command(f"{run} memcheck {_python(f'{PYTEST} {every}')}", 2, environment),
    ]


def _kernels(dry: bool) -> list[Command]:
    if dry:
        return [Command(_python("-m bench kernel --quick --device cpu"), 1)]
    return [
        Command(_python("-m bench kernel --backend cuda"), 1),
        Command(_python("-m bench kernel --backend triton"), 1.5),
        Command(_python("-m bench convolutions"), 3),
    ]


def _bench(dry_line: str, *lines: tuple[float, str]) -> Callable[[bool], list[Command]]:
    """A stage of `bench` commands with their shares; dry, a smoke test on the CPU."""

    def commands(dry: bool) -> list[Command]:
        if dry:
            return [Command(_python(f"-m bench {dry_line} --quick --device cpu"), 1)]
        return [Command(_python(f"-m bench {line} --device cuda"), share) for share, line in lines]

    return commands


_RESNET = "model --model resnet50 --batch-size 256 --dtype bfloat16"
_BLOCKS = "block --dtype bfloat16 --batch-size 256"
_TINY = "model --model resnet18 --batch-size 2 --img-size 32 --against channels_last"
#: cuDNN's convolutions and CUDA's kernels: nothing to compile, and little to tune.
_CUDA = "--backend cuda --against channels_last"
_STOCK = "--backend cuda --against eager,channels_last,compile"
#: With Triton's convolutions where they are faster: hundreds are compiled on a new machine.
_TUNED = "--against channels_last"
_LEVELS = ("b'", "c'", "c")
#: Takes minutes to compile: last, so that it costs nobody else's time.
_LAST = "--backend cuda --against compile-max-autotune"

STAGES: dict[str, Callable[[bool], list[Command]]] = {
    "build": _build,
    "parity": _parity,
    "kernels": _kernels,
    "train": _bench(
        f"{_TINY} --mode train",
        (1, f"{_RESNET} --mode train {_CUDA}"),
        (2, f"{_RESNET} --mode train {_STOCK}"),
        (3, f"{_RESNET} --mode train {_TUNED}"),
    ),
    "infer": _bench(
        f"{_TINY} --mode infer",
        (1, f"{_RESNET} --mode infer {_STOCK}"),
        (2, f"{_RESNET} --mode infer {_TUNED}"),
    ),
    "blocks": _bench(
        "block --batch-size 2 --against channels_last",
        (1, f"{_BLOCKS} {_CUDA}"),
        (2, f"{_BLOCKS} {_TUNED}"),
    ),
    "levels": _bench(
        f"{_TINY} --mode train --level b",
        *((1, f'{_RESNET} --mode train {_TUNED} --level "{level}"') for level in _LEVELS),
    ),
    "sanitize": _sanitize,
    "autotune": _bench(
        f"{_TINY} --mode infer",
        *((2, f"{_RESNET} --mode {mode} {_LAST}") for mode in ("train", "infer")),
    ),
}


# ---------------------------------------------------------------- the run


def run_command(stage: str, command: Command, log: Path, limit: float) -> Outcome:
    """Run a command for at most `limit` seconds; what it prints goes to a log."""
    start = time.monotonic()
    with log.open("w") as file:
        file.write(f"$ {command.line}\n")
        file.flush()
        process = subprocess.Popen(
            command.line, shell=True, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, **command.environment}, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            _end(process)  # also on Ctrl-C
    return Outcome(stage, command, status, time.monotonic() - start, log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """First as by Ctrl-C: a benchmark then writes what it has."""
    for which, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, which)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def run_stages(names: Sequence[str], dry: bool, out: Path, seconds: float) -> list[Outcome]:
    """Every command of these stages, in order; what one leaves of its time is the others'."""
    planned = [(name, command) for name in names for command in STAGES[name](dry)]
    left = sum(command.share for _, command in planned)
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for number, (name, command) in enumerate(planned, start=1):
        limit = (end - time.monotonic()) * command.share / left
        left -= command.share
        outcomes.append(run_command(name, command, out / f"{number:02}-{name}.log", limit))
        print(f"{name}: {outcomes[-1].status} in {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes


def show(outcomes: Sequence[Outcome]) -> None:
    """The table of outcomes, and the last lines of what did not pass."""
    table = Table("stage", "command", "outcome", "seconds")
    for o in outcomes:
        table.add_row(o.stage, o.command.line.split(" -m ", 1)[-1], o.status, f"{o.seconds:.0f}")
    console = Console(width=160)
    console.print(table)
    for o in outcomes:
        if o.status != "passed":
            last = o.log.read_text(errors="replace").splitlines()[-15:]
            console.print(f"{o.log.name}:", *last, sep="\n", markup=False, highlight=False)


def main(arguments: Sequence[str]) -> int:
    """Run the stages asked for; 1 where something did not pass."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--stage", default="", help="only these, separated by |")
    parser.add_argument("--dry", action="store_true", help="on the CPU, on tiny sizes")
    parser.add_argument(
        "--seconds", type=float, default=TOTAL_SECONDS, help="for all (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="for logs")
    options = parser.parse_args(arguments)
    names = [name for name in options.stage.split("|") if name] or list(STAGES)
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"stage must be one of {', '.join(STAGES)}, got {', '.join(unknown)}")
    if not options.dry and not _has_gpu():
        parser.error("there is no GPU that torch can use; --dry (DRY=1) runs on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = run_stages(names, options.dry, options.out, options.seconds)
    show(outcomes)
    return int(any(o.status != "passed" for o in outcomes))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
