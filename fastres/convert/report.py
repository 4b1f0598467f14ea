"""What conversion and `explain` have to say about a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One block.

    Attributes:
        name: where it is in the model, as in `named_modules`.
        type: its class, with its library.
        fused: whether all of its norms and additions run fused, as it stands.
        reason: what keeps it from that, or what was done to it; empty where all is well.
        level: level of fusion, docs/design.md section 6; empty where it is not fused.
        backends: primitive -> implementation that runs it.
        runs: of a module whose forward was traced, how many fused operations it was found to hold;
            what is between them runs as it was written.
        blocks: residual blocks in it, (fused, all): sums with a shortcut.
        chains: in it, (fused, all): norms with what stands before and behind them, without a
            shortcut.
    """

    name: str
    type: str
    fused: bool
    reason: str = ""
    level: str = ""
    backends: Mapping[str, str] = field(default_factory=dict)
    runs: int = 0
    blocks: tuple[int, int] = (0, 0)
    chains: tuple[int, int] = (0, 0)

    @property
    def kernels(self) -> str:
        """The backends at work in this block."""
        return ", ".join(sorted({name.split(":")[0] for name in self.backends.values()}))


@dataclass(frozen=True)
class Report:
    """The blocks of a model: which run fused, and what is in the way of the others.

    Attributes:
        model: class of the model.
        rows: one per module that is or holds residual blocks and chains.
        changed: how many modules a conversion changed.
        notes: what concerns the model as a whole.
    """

    model: str
    rows: tuple[Row, ...]
    changed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def fused(self) -> int:
        """Number of rows that run fused wholly."""
        return sum(row.fused for row in self.rows)

    @property
    def unfused(self) -> int:
        """Number of rows that do not."""
        return len(self.rows) - self.fused

    @property
    def blocks(self) -> tuple[int, int]:
        """Residual blocks, (fused, all)."""
        return _sum([row.blocks for row in self.rows])

    @property
    def chains(self) -> tuple[int, int]:
        """Chains without a shortcut, (fused, all)."""
        return _sum([row.chains for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        counts = {"blocks": self.blocks, "chains": self.chains}
        return {**asdict(self), "fused": self.fused, "unfused": self.unfused, **counts}

    def __str__(self) -> str:
        """A plain table with a line per block, and the implementation of each primitive."""
        blocks, chains = ["{} of {}".format(*counts) for counts in (self.blocks, self.chains)]
        head = f"{self.model}: {blocks} residual blocks and {chains} chains fused"
        if self.changed:
            head += f", {self.changed} modules changed"
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([head, *_table(self.rows), *_kernels(self.rows), *notes])


def _sum(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    fused, every = [sum(one) for one in zip((0, 0), *counts, strict=True)]
    return fused, every


def _table(rows: tuple[Row, ...]) -> list[str]:
    if not rows:
        return []
    titles = ("module", "type", "fused", "level", "backends", "reason")
    cells = [(r.name or "(model)", r.type, _extent(r), r.level, r.kernels, r.reason) for r in rows]
    widths = [max(len(c[i]) for c in (titles, *cells)) for i in range(len(titles))]
    lines = [titles, tuple("-" * w for w in widths), *cells]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _extent(row: Row) -> str:
    return "yes" if row.fused else "partly" if row.runs else "no"


def _kernels(rows: tuple[Row, ...]) -> list[str]:
    """Which implementation runs each primitive, once for all blocks that are alike."""
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for row in rows:
        if row.backends:
            alike.setdefault(tuple(row.backends.items()), []).append(row.name or "(model)")
    lines = []
    for backends, names in alike.items():
        where = "every block" if len(names) == len(rows) else ", ".join(names)
        lines += ["", f"in {where}:"]
        width = max(len(primitive) for primitive, _ in backends)
        lines += [f"  {primitive:<{width}}  {which}" for primitive, which in backends]
    return lines
