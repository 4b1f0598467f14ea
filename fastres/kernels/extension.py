"""Installed packages that add to fastres: found by their entry points, imported when first needed.

A package names a module in the entry-point group `fastres.extensions`. Importing that module
registers what it has: implementations, activations, backends of its own.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

GROUP = "fastres.extensions"


class Extension(NamedTuple):
    """What an entry point names, and why it could not be imported, or None."""

    name: str
    module: str
    error: str | None


def switched_on() -> bool:
    """FASTRES_EXTENSIONS, looked at when something is first asked of the registry.

    Raises:
        ValueError: for a wrong value.
    """
    value = os.environ.get("FASTRES_EXTENSIONS", "1")
    if value not in ("0", "1"):
        raise ValueError(f"FASTRES_EXTENSIONS must be 0 or 1, got {value!r}")
    return value == "1"


class Discovery:
    """Imports every extension once, on the first call, whichever thread makes it.

    An extension may itself ask the registry while it is imported: it then sees what is there so
    far. Other threads wait until all are there.
    """

    def __init__(self, tables: Sequence[dict[Any, Any]]) -> None:
        self.tables = tables
        self.found: tuple[Extension, ...] | None = None
        self._lock = threading.RLock()
        self._busy = False

    def __call__(self) -> tuple[Extension, ...]:
        """The extensions; the modules of those without an error are imported."""
        if self.found is not None:
            return self.found
        with self._lock:
            if self.found is None and not self._busy:
                self._busy = True
                try:
                    self.found = tuple(self._import_all())
                finally:
                    self._busy = False
        return self.found or ()

    def _import_all(self) -> Iterator[Extension]:
        if not switched_on():
            return
        for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
            yield self._import(entry)

    def _import(self, entry: EntryPoint) -> Extension:
        try:
            with self._restored():
                entry.load()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"fastres extension {entry.name!r} ({entry.value}) is left out: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return Extension(entry.name, entry.value, reason)
        return Extension(entry.name, entry.value, None)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Takes back what was registered where an exception follows."""
        before = [{key: copy(value) for key, value in table.items()} for table in self.tables]
        try:
            yield
        except BaseException:
            for table, contents in zip(self.tables, before, strict=True):
                table.clear()
                table.update(contents)
            raise
