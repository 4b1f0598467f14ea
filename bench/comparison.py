"""Comparison of a result's rows: which belong together, the fastest, and whether it is a gain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .compare import THRESHOLD
from .results import Row, failed, setting

Outcome = Literal["faster", "level", "slower"]

#: How a title says what rows of one comparison share.
_SHARED = {
    "kind": "{}",
    "subject": "{}",
    "mode": "{}",
    "batch": "batch {}",
    "size": "{} px",
    "dtype": "{}",
    "amp": "amp {}",
    "device": "{}",
    "allocator": "freed memory {}",
}
#: What tells two rows of one contender apart.
_VARIANT = ("backend", "level", "memory", "layout", "batch")

#: fastres's rows: of whole steps, and by backend of single kernels; "aten:" is torch's own.
_OURS = ("fastres", "cpu:", "cuda:", "triton:")

#: Parts of the work, timed as a bound: they compete with nobody.
_LIMITS = ("convolutions", "copy")


@dataclass(frozen=True)
class Setting:
    """One comparison: the rows that answer the same question, each under a label of its own."""

    title: str
    rows: tuple[tuple[str, Row], ...]

    @property
    def timed(self) -> list[tuple[str, Row]]:
        """Rows with a speed, that is, with parity."""
        return [(label, row) for label, row in self.rows if speed(row) is not None]

    @property
    def ours(self) -> tuple[str, Row] | None:
        """The fastest row of fastres."""
        return _fastest(pair for pair in self.timed if is_ours(pair[1]))

    @property
    def baseline(self) -> tuple[str, Row] | None:
        """The fastest row of anyone else."""
        return _fastest(pair for pair in self.timed if not is_ours(pair[1]) and competes(pair[1]))

    @property
    def ratio(self) -> float | None:
        """Speed of `ours` over that of `baseline`; None where one of them is not there."""
        if self.ours is None or self.baseline is None:
            return None
        return _speed(self.ours[1]) / _speed(self.baseline[1])

    @property
    def outcome(self) -> Outcome | None:
        """A gain or a loss only where medians and quartiles both say so."""
        ratio = self.ratio
        if ratio is None or self.ours is None or self.baseline is None:
            return None
        apart = not _overlap(spread(self.ours[1]), spread(self.baseline[1]))
        if not apart or 1 / (1 + THRESHOLD) <= ratio <= 1 + THRESHOLD:
            return "level"
        return "faster" if ratio > 1 else "slower"


def settings_of(rows: Iterable[Row]) -> list[Setting]:
    """The comparisons of a result, in its order; a title says what the others do not share."""
    kept = list(rows)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in kept:
        groups.setdefault(_key(row, kept), []).append(row)
    firsts = [group[0] for group in groups.values()]
    varying = [key for key in _SHARED if len({str(row.get(key)) for row in firsts}) > 1]
    return [Setting(_title(g[0], varying), tuple(_labelled(g))) for g in groups.values()]


def speed(row: Row) -> float | None:
    """Images, or where a row has no batch steps, per second; None where it has no time."""
    return row["images_per_s"] or ((row["batch"] or 1) / row["ms"] * 1e3 if row["ms"] else None)


def spread(row: Row) -> tuple[float, float]:
    """The quartiles of `speed`, the lower one first; twice the median where there are none."""
    middle, ms = _speed(row), row["ms"]
    if not ms or not row["low"] or not row["high"]:
        return middle, middle
    return middle * ms / row["high"], middle * ms / row["low"]


def is_ours(row: Row) -> bool:
    """Whether a row is fastres's own."""
    return row["contender"].startswith(_OURS)


def competes(row: Row) -> bool:
    """Whether a row does the whole work; of kernels, torch's formula is only the definition."""
    return row["kind"] != "kernel" and not row["contender"].startswith(_LIMITS)


def silence(row: Row) -> str:
    """Why a row has no speed."""
    if failed(row):
        return f"no speed: parity {row['parity']}"
    return row["note"] or "not measured"


def _speed(row: Row) -> float:
    per_second = speed(row)
    if per_second is None:
        raise ValueError(f"row must have a time, got {row['contender']} without one")
    return per_second


def _fastest(pairs: Iterable[tuple[str, Row]]) -> tuple[str, Row] | None:
    return max(pairs, key=lambda pair: _speed(pair[1]), default=None)


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def _key(row: Row, rows: Sequence[Row]) -> tuple[Any, ...]:
    """The batch belongs to it only where a contender ran at several: memory may have halved one."""
    ran = Counter(
        r["contender"] for r in {_run(r): r for r in rows}.values() if setting(r) == setting(row)
    )
    return (*setting(row), row["batch"] if max(ran.values()) > 1 else None)


def _run(row: Row) -> tuple[Any, ...]:
    return (*setting(row), row["contender"], row["batch"])


def _title(row: Row, varying: Sequence[str]) -> str:
    shown = [k for k in _SHARED if k in varying or k == "subject"]
    if f"{row['size']}x{row['size']}" in row["subject"]:
        shown = [k for k in shown if k != "size"]
    parts = [_SHARED[k].format(row.get(k)) for k in shown if row.get(k) is not None]
    return ", ".join(parts)


def _labelled(group: Sequence[Row]) -> Iterable[tuple[str, Row]]:
    for row in group:
        twins = [other for other in group if other["contender"] == row["contender"]]
        parts = [str(row.get(k)) for k in _VARIANT if len({str(t.get(k)) for t in twins}) > 1]
        yield " ".join([row["contender"], *parts]), row
