"""Turns a result of the benchmark into the table of README.md."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def section_of(result: dict[str, Any]) -> str:
    """The Markdown tables of a result."""
    return "\n".join([_conditions(result), "", *_blocks(result), "", *_kernels(result)])


def write_section(result: dict[str, Any], readme: Path | None) -> str:
    """The tables, also put between the markers of `readme` where one is given."""
    section = section_of(result)
    if readme is not None:
        text = readme.read_text()
        pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
        readme.write_text(pattern.sub(lambda _: f"{BEGIN}\n{section}\n{END}", text))
    return section


def _conditions(result: dict[str, Any]) -> str:
    return (
        f"{result['cpu']}, {result['threads']} threads, torch {result['torch']}, "
        f"{result['blocks'][0]['dtype']}, channels_last, batch 16; bottleneck blocks, "
        "milliseconds, medians of alternating rounds. *kept*: glibc told to keep freed memory."
    )


def _blocks(result: dict[str, Any]) -> list[str]:
    cells: dict[tuple[str, str, str], dict[str, Any]] = {
        (row["block"], row["mode"], row["contender"]): row for row in result["blocks"]
    }
    lines = [
        "| block | eager | fastres | speedup | eager, kept | fastres, kept | speedup, kept "
        "| over convolutions, kept | eval speedup | saved MB, eager | saved MB, fastres |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for block in dict.fromkeys(row["block"] for row in result["blocks"]):

        def ms(contender: str, mode: str = "train", block: str = block) -> float:
            return float(cells[block, mode, contender]["ms"])

        saved = [cells[block, "saved", name]["bytes"] / 1e6 for name in ("eager", "fastres")]
        lines.append(
            f"| {block} | {ms('eager'):.1f} | {ms('fastres'):.1f} "
            f"| {ms('eager') / ms('fastres'):.2f}x "
            f"| {ms('eager, kept'):.1f} | {ms('fastres, kept'):.1f} "
            f"| {ms('eager, kept') / ms('fastres, kept'):.2f}x "
            f"| {ms('fastres, kept') / ms('convolutions, kept'):.2f}x "
            f"| {ms('eager', 'infer') / ms('fastres', 'infer'):.2f}x "
            f"| {saved[0]:.0f} | {saved[1]:.0f} |"
        )
    return lines


def _kernels(result: dict[str, Any]) -> list[str]:
    lines = ["Fused kernels, time over that of copying as many bytes:", ""]
    shapes = list(dict.fromkeys((r["shape"], r["dtype"]) for r in result["kernels"]))
    lines.append("| kernel | " + " | ".join(f"{s} {d}" for s, d in shapes) + " |")
    lines.append("|---|" + "---|" * len(shapes))
    for kernel in dict.fromkeys(r["kernel"] for r in result["kernels"]):
        found = {
            (r["shape"], r["dtype"]): r["over_copy"]
            for r in result["kernels"]
            if r["kernel"] == kernel
        }
        lines.append(f"| `{kernel}` | " + " | ".join(f"{found[k]:.2f}x" for k in shapes) + " |")
    return lines


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    write_section(json.loads(Path(sys.argv[1]).read_text()), here.parent / "README.md")
