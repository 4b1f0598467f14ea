"""What goes on now, on a terminal: a bar of what is done, the time it took, a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Doing(Protocol):
    """Is told what goes on, and which part of the whole, from 0 to 1, is done."""

    def __call__(self, text: str, done: float | None = None) -> None:
        """Show it; None leaves the bar as it is."""


@contextmanager
def progress(console: Console) -> Iterator[Doing]:
    """A bar while the block runs, gone after it; nothing where `console` is no terminal."""
    columns = (
        BarColumn(24), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    # Drawn seldom: it shares the machine with what is measured.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=1,
        disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("starting", total=1.0)

        def doing(text: str, done: float | None = None) -> None:
            bar.update(task, description=text, completed=done)

        yield doing
