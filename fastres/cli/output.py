"""Text on the terminal: rich where it is installed, plain columns where it is not."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


def heading(text: str) -> None:
    """A section's title."""
    try:
        from rich.console import Console
    except ImportError:
        print(f"\n{text}")
        return
    Console(highlight=False).print(f"\n[bold]{text}[/bold]")


def table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of text in aligned columns; the last column wraps at the terminal's edge."""
    if not rows:
        return
    columns = len(rows[0]) - 1
    widths = [max(len(row[i]) for row in rows) for i in range(columns)]
    indent = 2 + sum(widths) + 2 * columns
    room = max(30, shutil.get_terminal_size((100, 24)).columns - indent)
    for row in rows:
        first = "  " + "".join(f"{cell:<{w}}  " for cell, w in zip(row, widths, strict=False))
        lines = textwrap.wrap(row[-1], room, break_on_hyphens=False) or [""]
        print(first + lines[0])
        for line in lines[1:]:
            print(" " * indent + line)


def as_json(facts: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    json.dump(facts, sys.stdout, indent=2)
    print()
