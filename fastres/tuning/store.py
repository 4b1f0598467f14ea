"""Where choices are kept: a file per machine, and the tables that ship with fastres.

A file is one JSON object: what it holds for, and `choices`, each with its problem, the name of
the candidate that was taken and, for reading, the milliseconds of all that were measured.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from fastres.tuning.machine import Machine, cache_file, current_device, machine_of

#: Version of the format.
FORMAT = 1

#: How long a choice waits for another process that writes; a file takes milliseconds.
LOCK_SECONDS = 10.0

#: Held while something is measured or written. A candidate may itself be tuned while it is
#: measured, on the same thread.
lock = threading.RLock()


class Problem(NamedTuple):
    """What a choice depends on, apart from the machine.

    Attributes:
        kernel: what is to run, such as "conv_fwd" or "primitive/conv_forward".
        sizes: sizes, names of dtypes, flags: int, str or bool.
        source: hash of the kernel's source, "" where there is none, so that a kernel that was
            edited is tuned anew.
    """

    kernel: str
    sizes: tuple[int | str | bool, ...]
    source: str = ""


class Choice(NamedTuple):
    """A candidate that was taken.

    Attributes:
        name: the candidate's name.
        milliseconds: of every candidate that was measured, by name.
    """

    name: str
    milliseconds: Mapping[str, float]


Choices = dict[Problem, Choice]
Header = dict[str, str | int]


def render(header: Header, choices: Mapping[Problem, Choice]) -> str:
    """The text of a file, one line per choice, in an order that makes for small differences."""
    rows = [
        json.dumps(
            {
                **problem._asdict(),
                "choice": choice.name,
                "ms": {name: float(f"{ms:.4g}") for name, ms in choice.milliseconds.items()},
            }
        )
        for problem, choice in choices.items()
    ]
    head = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in header.items())
    return f'{{{head},\n"choices": [\n' + ",\n".join(sorted(rows)) + "\n]}\n"


def parse(text: str, header: Header) -> Choices:
    """The choices in the text of a file.

    Raises:
        ValueError: for anything but what `render` writes with the same header.
    """
    try:
        data = json.loads(text)
        written_for = {key: data[key] for key in header}
        choices = {
            Problem(e["kernel"], tuple(e["sizes"]), e["source"]): Choice(e["choice"], dict(e["ms"]))
            for e in data["choices"]
        }
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is not a file of choices: {error!r}") from error
    if written_for != header:
        raise ValueError(f"it was written for {written_for}, not for {header}")
    return choices


def read(path: Traversable, header: Header) -> Choices:
    """The choices in a file; none, with a warning, in one that is broken or somebody else's.

    Raises:
        OSError: for a file that is there and cannot be read.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), header)
    except FileNotFoundError:
        pass
    except ValueError as error:  # of the JSON, the encoding or the content
        _warn(path, f"is ignored ({error})")
    return {}


def _read_if_possible(path: Traversable, header: Header) -> Choices:
    try:
        return read(path, header)
    except OSError as error:
        _warn(path, f"cannot be read ({error})")
        return {}


_warned: set[str] = set()


def _warn(path: Traversable | Path, what: str) -> None:
    """Once per file: a step goes on without it, and a training run has many steps."""
    if str(path) not in _warned:
        _warned.add(str(path))
        warnings.warn(f"the autotuner's file {path} {what}", RuntimeWarning, stacklevel=2)


class Store:
    """The choices of one machine: those of its file, read once, and those measured since."""

    def __init__(self, path: Path, machine: Machine) -> None:
        self.path = path
        self.header: Header = {"format": FORMAT, **machine._asdict()}
        self.choices = _read_if_possible(path, self.header)
        self._measured: Choices = {}
        self._writable = True

    def keep(self, problem: Problem, choice: Choice) -> None:
        """Remember a choice that was measured, on disk where that is possible.

        A broken file is replaced: whatever it held is lost, and would be measured anew.
        """
        self.choices[problem] = self._measured[problem] = choice
        if not self._writable:
            return
        try:
            self._write()
        except (OSError, NotImplementedError) as error:  # the second: no locks on this system
            self._writable = False
            _warn(self.path, f"cannot be written ({error}); choices stay in memory")

    def _write(self) -> None:
        """Read, merge, write: other processes have kept choices of their own meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS):
            self.choices |= {**read(self.path, self.header), **self._measured}
            new = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
            try:
                new.write_text(render(self.header, self.choices), encoding="utf-8")
                os.replace(new, self.path)
            finally:
                new.unlink(missing_ok=True)


@cache
def store_of(machine: Machine, path: Path) -> Store:
    """The one store of this process for a machine."""
    return Store(path, machine)


def tables() -> Traversable:
    """The folder of the tables that ship."""
    return files("fastres.tuning") / "tables"


@cache
def table_of(machine: Machine) -> Mapping[Problem, Choice]:
    """The table that ships for a machine's device; empty where there is none."""
    return _read_if_possible(tables() / machine.table_name, _table_header(machine))


def _table_header(machine: Machine) -> Header:
    return {"format": FORMAT, "device": machine.device}


def kept(device: torch.device | None = None) -> Mapping[Problem, Choice]:
    """What was measured on a device, in this process or before; the current GPU by default."""
    device = device or current_device()
    with lock:
        return dict(store_of(machine_of(device), cache_file(device)).choices)


def shipped(device: torch.device | None = None) -> Mapping[Problem, Choice]:
    """What fastres ships for a device; the current GPU by default."""
    return dict(table_of(machine_of(device or current_device())))


def export(path: str | Path, device: torch.device | None = None) -> Path:
    """Write what was measured on a device as a table that ships.

    What the shipped table of that device holds already is in it too, where nothing newer was
    measured.

    Args:
        path: the file; or a folder, where the table gets the name under which it is looked for.
        device: whose choices; the current GPU by default.

    Returns:
        The file that was written.

    Raises:
        RuntimeError: where nothing was measured on that device.
        OSError: where the file cannot be written.
    """
    device = device or current_device()
    machine, measured = machine_of(device), kept(device)
    if not measured:
        raise RuntimeError(f"no choice was kept for {machine.device} in {cache_file(device)}")
    file = Path(path)
    file = file / machine.table_name if file.is_dir() else file
    text = render(_table_header(machine), {**shipped(device), **measured})
    file.write_text(text, encoding="utf-8")
    return file


def forget_stores() -> None:
    """Drop what was read, measured and warned of; the files stay."""
    store_of.cache_clear()
    table_of.cache_clear()
    _warned.clear()
