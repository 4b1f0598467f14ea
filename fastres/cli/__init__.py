"""The `fastres` command. One file per command; torch is imported only by the command that runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from fastres.cli.errors import CommandError

#: Each command is the module `fastres.cli.<name>` with a function `main(arguments) -> exit status`.
COMMANDS = {
    "doctor": "what is installed, what can run here, and what is missing",
    "explain": "which blocks of a model are fused, and why the others are not",
    "demo": "train a ResNet on handwritten digits, stock and fused, and write a report",
    "bench": "measure speed and memory beside stock PyTorch, or compare two results",
}

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 where a command's own check failed, 2 for input it cannot use (with
        one sentence on stderr), 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)

    def run() -> int:
        status: int = importlib.import_module(f"fastres.cli.{args.command}").main(args.arguments)
        return status

    return guarded(args.command, run)


def guarded(name: str, run: Callable[[], int]) -> int:
    """The exit status of a command's `run`, whatever ends it; see `main`."""
    try:
        status = run()
        sys.stdout.flush()
        return status
    except CommandError as error:
        print(f"fastres {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastres {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `fastres doctor | head`: the reader has what it wanted. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="fastres",
        description="Fused residual blocks for PyTorch.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
        + "\n\n`fastres COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _version() -> str:
    from fastres import __version__

    return f"fastres {__version__}"
