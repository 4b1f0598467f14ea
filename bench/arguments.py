"""The arguments of `fastres bench`, checked before anything is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastres.block import LEVELS
from fastres.block.settings import MEMORY_MODES
from fastres.cli.errors import CommandError
from fastres.kernels import BACKENDS, PRIMITIVES

from . import results
from .conditions import ROOT
from .contenders import CONTENDERS, Job, why_not
from .models import IMAGE_SIZE, find

DTYPES = ("float32", "bfloat16", "float16")
MODES = {"train": ("train",), "infer": ("infer",), "both": ("train", "infer")}

#: What each command measures; the others have a command line of their own.
KINDS = {
    "kernel": "every registered implementation of a primitive, against a copy of its bytes",
    "conv": "ResNet-50's convolutions, each with its batch norm and ReLU, forward and backward",
    "block": "ResNet-50's blocks, forward and backward",
    "model": "a whole network's step: forward, loss, backward, update; or inference",
    "train": "training from start to end, data loading included, with learning curves",
}
OTHERS = {
    "compare": "what moved between two result files",
    "report": "the page of a result file, drawn again",
    "readme": "README.md's tables, from the result files that it names",
    "coverage": "what is recognised of many networks; writes docs/coverage.md",
    "convolutions": "Triton's fused convolutions, beside cuDNN's and separate passes",
    "host": "what a block costs where there is nearly nothing to compute",
    "launches": "what a launch costs on the host",
    "resources": "what the GPU kernels take once compiled; writes docs/kernels.md",
}

#: What is measured where nothing else is asked for: by device, and of a smoke test.
BATCH, QUICK_BATCH = {"cpu": 16, "cuda": 256}, 2
SIZE, QUICK_SIZE = IMAGE_SIZE, 64
ROUNDS, QUICK_ROUNDS = 21, 3
AGAINST, QUICK_AGAINST = "eager,channels_last,compile", "eager,channels_last"
#: The handwritten digits: as `fastres demo` enlarges them, and how long they are learned.
TRAIN = {"batch_size": 128, "img_size": 32, "epochs": 6, "against": "channels_last"}
QUICK_TRAIN = {"batch_size": 64, "img_size": 8, "epochs": 1, "against": "channels_last"}
FOLDER_SIZE = 224


class _Parser(argparse.ArgumentParser):
    """One sentence for a wrong argument, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see {self.prog} --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with what was left out filled in.

    Raises:
        CommandError: for what cannot be.
    """
    options = _parser().parse_args(arguments)
    _check_device(options)
    _fill_in(options)
    _check_names(options)
    _check_numbers(options)
    _check_files(options)
    return options


def _parser() -> argparse.ArgumentParser:
    commands = KINDS | OTHERS
    parser = _Parser(
        prog="fastres bench",
        description="Speed and memory beside stock PyTorch, on the machine at hand: parity first, "
        "then alternating rounds, medians with their spread, losses like wins.",
        epilog="contenders:\n" + "\n".join(f"  {n:<21}{c.meaning}" for n, c in CONTENDERS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    for name, text in commands.items():
        subparser = kinds.add_parser(name, help=text, description=text)
        if name in KINDS:
            _add_options(subparser, name)
    return parser


def _add_options(parser: argparse.ArgumentParser, kind: str) -> None:
    add = parser.add_argument
    add_own = {"kernel": _kernel_options, "train": _train_options}
    add_own.get(kind, _timing_options)(add)
    if kind in ("model", "train"):
        add("--model", help="of torchvision, timm or fastres.models; LIBRARY:NAME names one")
    if kind != "kernel":
        _step_options(add)
    if kind != "train":
        add("--rounds", type=int, help=f"how often each contender is timed (default: {ROUNDS})")
    add("--device", help="cpu or cuda (default: a GPU where there is one)")
    add("--csv", type=Path, metavar="PATH", help="also write the rows there")
    add("--out", type=Path, metavar="FOLDER", help=f"for results (default: {shown(_folder())})")
    add("--no-report", dest="report", action="store_false", help="no HTML page")
    add("--quick", action="store_true",
        help="tiny sizes: a smoke test, written only where --out is given")  # fmt: skip


def _kernel_options(add: Callable[..., Any]) -> None:
    add("--primitive", help="one only; by default all that are bound by memory")
    add("--backend", default="auto", help="of one backend only")
    add("--batch-size", type=int, metavar="N", help="default: 256 on a GPU, 16 on a CPU")
    add("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")


def _timing_options(add: Callable[..., Any]) -> None:
    add("--mode", default="both", help="train, infer or both (default)")
    add("--against", metavar="A,B", help=f"contenders beside fastres (default: {AGAINST}; of "
        "networks in float32 on a CPU also the engines that are installed)")  # fmt: skip
    add("--kept", action=argparse.BooleanOptionalAction, default=True,
        help="on a CPU, all once more with malloc keeping freed memory (default)")  # fmt: skip


def _train_options(add: Callable[..., Any]) -> None:
    add("--against", metavar="A,B", help="contenders beside fastres (default: channels_last)")
    add("--epochs", type=int, help=f"default: {TRAIN['epochs']}")
    add("--data", type=Path, metavar="FOLDER", help="images in one folder per class; default: "
        "scikit-learn's handwritten digits")  # fmt: skip
    add("--workers", type=int, default=1, help="processes that load data (default: 1)")


def _step_options(add: Callable[..., Any]) -> None:
    add("--batch-size", type=int, metavar="N", help="default: 256 on a GPU, 16 on a CPU")
    add("--img-size", type=int, metavar="N", help=f"pixels per side (default: {IMAGE_SIZE})")
    add("--amp", action="store_true", help="autocast to --dtype, bfloat16 unless it is given")
    add("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default: float32)")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True,
        help="layout of what does not bring its own (default: channels_last)")  # fmt: skip
    add("--backend", default="auto", help="as fastres.use_backend")
    add("--memory", default="auto", help="as fastres.use_memory")
    add("--level", default="auto", help="as fastres.use_level")


def _folder() -> Path:
    """bench/results of a checkout; of an installed package, a folder where the user is."""
    kept = ROOT / "results"
    return kept if kept.is_dir() else Path("fastres-bench")


def shown(path: Path) -> str:
    """A path as the user sees it from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


# ---------------------------------------------------------------- checks


def _fill_in(options: argparse.Namespace) -> None:
    """What was not given, as the command and --quick have it."""
    quick = options.quick
    defaults: dict[str, Any] = {"rounds": QUICK_ROUNDS if quick else ROUNDS}
    if options.kind == "train":
        defaults = dict(QUICK_TRAIN if quick else TRAIN)
        if options.data is not None and not quick:
            defaults["img_size"] = FOLDER_SIZE
    elif options.kind != "kernel":
        defaults |= {
            "batch_size": QUICK_BATCH if quick else BATCH[options.device],
            "img_size": QUICK_SIZE if quick else SIZE,
            "against": QUICK_AGAINST if quick else ",".join([AGAINST, *_engines(options)]),
        }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.writes = options.out is not None or not quick
    options.out = options.out or _folder()


def _engines(options: argparse.Namespace) -> list[str]:
    """The engines that can run what is asked for, in inference where both modes are."""
    if options.mode == "train":
        return []
    way = {"dtype": options.dtype, "amp": options.amp, "device": options.device}
    jobs = (Job(options.kind, "", 1, 1, name, "infer", **way) for name in CONTENDERS)
    return [job.contender for job in jobs if job.who.engine and why_not(job) is None]


def _check_names(options: argparse.Namespace) -> None:
    allowed = {
        "dtype": DTYPES, "memory": MEMORY_MODES, "level": ("auto", *LEVELS),
        "mode": tuple(MODES), "primitive": tuple(PRIMITIVES),
    }  # fmt: skip
    for name, values in allowed.items():
        if getattr(options, name, None) is not None:
            _among(f"--{name}", getattr(options, name), values)
    if hasattr(options, "against"):
        options.against = [name.strip() for name in options.against.split(",")]
        for name in options.against:
            _among("--against", name, tuple(CONTENDERS))
    if getattr(options, "model", None):
        find(options.model)


def _check_device(options: argparse.Namespace) -> None:
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _among("--device", options.device, tuple(BATCH))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device must be one of this machine, got cuda: torch sees no GPU")
    backend = getattr(options, "backend", "auto")
    try:
        with Job("model", "", 1, 1, "fastres", backend=backend).settings():
            devices = BACKENDS[backend].devices if backend != "auto" else (options.device,)
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"--backend: {error}") from error
    if options.device not in devices:
        raise CommandError(
            f"--backend must be one that runs on {options.device}, got {backend}, which runs on "
            f"{', '.join(devices)}"
        )


def _check_numbers(options: argparse.Namespace) -> None:
    least = {"batch_size": 1, "img_size": 1, "rounds": 2, "epochs": 1, "workers": 0}
    for name, smallest in least.items():
        value = getattr(options, name, None)
        if value is not None and value < smallest:
            raise CommandError(
                f"--{name.replace('_', '-')} must be at least {smallest}, got {value}"
            )


def _check_files(options: argparse.Namespace) -> None:
    try:
        if options.writes:
            results.ready(options.out)
        if options.csv is not None:
            results.ready(options.csv.parent)
    except OSError as error:
        raise CommandError(str(error)) from error
    if options.csv is not None and options.csv.is_dir():
        raise CommandError(f"--csv must be a file, got the folder {options.csv}")


def _among(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise CommandError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
