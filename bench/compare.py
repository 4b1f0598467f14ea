"""`fastres bench compare A B`: what moved between two results by more than their noise.

A time moved where the quartiles of the two runs do not overlap and the medians differ by more than
3 %. Gains and losses are listed alike, and so is what only one of the two has.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastres.cli.errors import CommandError

from .results import Row, memory_text, read, way_of

#: Medians closer than this did not move: runs of one commit on a quiet machine differ that much.
THRESHOLD = 0.03

_KEYS = ("kind", "subject", "contender", "mode", "batch", "size", "dtype", "amp", "layout",
         "backend", "memory", "level", "device", "allocator")  # fmt: skip
#: Conditions without which two times are of different machines or different programs.
_CONDITIONS = ("cpu", "gpu", "driver", "threads", "torch", "triton", "fastres", "python", "commit")

Outcome = Literal[
    "faster", "slower", "less", "more", "new", "missing", "parity lost", "parity won", "same"
]
_STYLES = {
    "faster": "green", "less": "green", "parity won": "green",
    "slower": "red", "more": "red", "parity lost": "bold red",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What became of one row; `what` is "ms", "peak_bytes", "saved_bytes" or "parity"."""

    row: Row
    what: str
    before: Any
    after: Any
    outcome: Outcome

    @property
    def ratio(self) -> float | None:
        """After over before, where both are numbers."""
        numbers = isinstance(self.before, int | float) and isinstance(self.after, int | float)
        return self.after / self.before if numbers and self.before else None


def compare(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """Every change between two runs' rows, and one "same" for each row without any."""
    old, new = _by_key(before), _by_key(after)
    changes: list[Change] = []
    for key, row in old.items():
        if key in new:
            changes += _changes(row, new[key]) or [_change(row, new[key], "ms", "same")]
        else:
            changes.append(Change(row, "ms", row["ms"], None, "missing"))
    only_new = [row for key, row in new.items() if key not in old]
    return changes + [Change(row, "ms", None, row["ms"], "new") for row in only_new]


def _by_key(rows: Iterable[Row]) -> dict[tuple[object, ...], Row]:
    """Rows by what was measured; equals are told apart by their order."""
    seen: Counter[tuple[object, ...]] = Counter()
    by_key: dict[tuple[object, ...], Row] = {}
    for row in rows:
        fields: Mapping[str, object] = row
        key = tuple(fields[name] for name in _KEYS)
        seen[key] += 1
        by_key[(*key, seen[key])] = row
    return by_key


def _changes(old: Row, new: Row) -> list[Change]:
    changes = []
    parities = (old["parity"], new["parity"])
    if None not in parities and (parities[0] == "ok") != (parities[1] == "ok"):
        outcome: Outcome = "parity won" if new["parity"] == "ok" else "parity lost"
        changes.append(_change(old, new, "parity", outcome))
    elif bool(old["ms"]) != bool(new["ms"]):
        changes.append(_change(old, new, "ms", "missing" if old["ms"] else "new"))
    if old["ms"] and new["ms"] and _apart(old, new):
        changes.append(_change(old, new, "ms", "slower" if new["ms"] > old["ms"] else "faster"))
    for what in ("peak_bytes", "saved_bytes"):
        a, b = _field(old, what), _field(new, what)
        if a is not None and b is not None and abs(b - a) > THRESHOLD * a:
            changes.append(_change(old, new, what, "more" if b > a else "less"))
    return changes


def _apart(old: Row, new: Row) -> bool:
    """Whether times differ beyond noise; without quartiles the median is all there is."""
    (a_low, a, a_high), (b_low, b, b_high) = _quartiles(old), _quartiles(new)
    return abs(b - a) > THRESHOLD * a and (a_high < b_low or b_high < a_low)


def _quartiles(row: Row) -> tuple[float, float, float]:
    ms = row["ms"] or 0.0
    low, high = (ms if bound is None else bound for bound in (row["low"], row["high"]))
    return low, ms, high


def _change(old: Row, new: Row, what: str, outcome: Outcome) -> Change:
    return Change(new, what, _field(old, what), _field(new, what), outcome)


def _field(row: Mapping[str, Any], name: str) -> Any:
    return row[name]


# ---------------------------------------------------------------- on the terminal


def main(arguments: Sequence[str]) -> int:
    """Compare two result files and print what moved; always 0, as a loss is a finding.

    Raises:
        CommandError: where a file cannot be read or is not a result.
    """
    parser = argparse.ArgumentParser(
        prog="fastres bench compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("before", type=Path, metavar="A", help="a result file")
    parser.add_argument("after", type=Path, metavar="B", help="another, usually a later one")
    options = parser.parse_args(arguments)
    try:
        before, after = read(options.before), read(options.after)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    show(before, after, Console())
    return 0


def show(before: Mapping[str, Any], after: Mapping[str, Any], console: Console) -> None:
    """Print what moved between two results, and the conditions in which they differ."""
    for name in _CONDITIONS:
        if before.get(name) != after.get(name):
            console.print(Text(f"{name}: {before.get(name, '-')} -> {after.get(name, '-')}"))
    changes = compare(before["rows"], after["rows"])
    moved = [change for change in changes if change.outcome != "same"]
    if moved:
        console.print(_table(moved))
    counts = Counter(change.outcome for change in changes)
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    console.print(Text(said or "neither result has rows"))


def _table(changes: Sequence[Change]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("row", overflow="fold")
    for name in ("what", "A", "B", "B / A"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("verdict")
    for change in changes:
        ratio = "-" if change.ratio is None else f"{change.ratio:.3f}"
        values = (_value(change.what, v) for v in (change.before, change.after))
        outcome = Text(change.outcome, style=_STYLES.get(change.outcome, ""))
        table.add_row(Text(_name(change.row)), change.what, *values, ratio, outcome)
    return table


def _name(row: Row) -> str:
    settings = (way_of(row), row["dtype"], "amp" if row["amp"] else None, row["layout"],
                row["backend"], row["memory"], row["level"])  # fmt: skip
    batch = f"batch {row['batch']}" if row["batch"] else None
    size = f"{row['size']} px" if row["size"] else None
    return ", ".join(filter(None, (row["subject"], row["contender"], *settings, batch, size)))


def _value(what: str, value: Any) -> Text:
    if what == "parity" or value is None:
        return Text("-" if value is None else str(value))
    return Text(f"{value:,.4g}" if what == "ms" else memory_text(value))
