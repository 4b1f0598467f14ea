"""`python -m bench readme`: README.md's tables, from the result files that it names itself.

A table stands between `<!-- bench:begin KIND FILE -->` and `<!-- bench:end -->`; FILE is a result
below the repository's top. `--use FILE` lets README name another one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastres.cli.errors import CommandError

from .bars import figure_text
from .conditions import ROOT
from .results import Row, failed, memory_text, read
from .summary import headline, shared
from .verdicts import Setting, settings_of

MARKS = {"faster": "▲", "level": "●", "slower": "▼"}
README = ROOT.parent / "README.md"
SECTION = re.compile(
    r"<!-- bench:begin (?P<kind>\S+) (?P<file>\S+) -->\n(?P<text>.*?)<!-- bench:end -->", re.DOTALL
)


def main(arguments: Sequence[str]) -> int:
    """Rewrite README's tables, or with --check say whether that would change it.

    Returns: 1 where --check found README to differ, else 0.

    Raises:
        CommandError: where README or a file that it names is not there, or is not a result.
    """
    parser = argparse.ArgumentParser(prog="python -m bench readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where it differs")
    parser.add_argument("--use", type=Path, metavar="FILE", help="show this result from now on")
    options = parser.parse_args(arguments)
    if not README.is_file():
        raise CommandError(f"README.md must be beside bench/, got none at {README}")
    before = README.read_text(encoding="utf-8")
    text = rendered(use(before, options.use, ROOT.parent) if options.use else before, ROOT.parent)
    if options.check:
        print("README.md differs from its result files" if text != before else "README.md is right")
        return int(text != before)
    README.write_text(text, encoding="utf-8")
    return 0


def rendered(text: str, top: Path) -> str:
    """A README with each of its tables as its result file has it.

    Args:
        text: the README.
        top: the folder that its files are named from.

    Raises:
        CommandError: for a kind without a table, and a file that cannot be read.
    """

    def section(found: re.Match[str]) -> str:
        kind, file = found["kind"], found["file"]
        if kind not in TABLES:
            raise CommandError(f"bench:begin must name one of {', '.join(TABLES)}, got {kind}")
        lines = TABLES[kind](_read(top / file))
        body = "\n".join(lines)
        return f"<!-- bench:begin {kind} {file} -->\n{body}\n<!-- bench:end -->"

    return SECTION.sub(section, text)


def use(text: str, path: Path, top: Path) -> str:
    """A README that names another result for the kind of table that this one has.

    Raises:
        CommandError: where the file is not below `top`, or README has no table of its kind.
    """
    result, here = _read(path), path.resolve()
    if not here.is_relative_to(top.resolve()):
        raise CommandError(f"--use must name a file below {top}, got {path}")
    kind = "block" if "blocks" in result else result["rows"][0]["kind"]
    begin = rf"<!-- bench:begin {re.escape(kind)} \S+ -->"
    if not re.search(begin, text):
        raise CommandError(f"README.md must have a table of {kind}, got none for {path}")
    new = f"<!-- bench:begin {kind} {here.relative_to(top.resolve()).as_posix()} -->"
    return re.sub(begin, lambda _: new, text)


def _read(path: Path) -> dict[str, Any]:
    """A result with rows, or one of before there were rows."""
    try:
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        result: dict[str, Any] = old if isinstance(old, dict) and "blocks" in old else read(path)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if not (result.get("rows") or result.get("blocks")):
        raise CommandError(f"{path} must be a result with rows, got one without")
    return result


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ("| " + " | ".join(t.replace("|", "\\|") for t in cells) + " |" for cells in rows)
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines]


# ---------------------------------------------------------------- results with rows


def _rows(result: Mapping[str, Any]) -> list[str]:
    """One comparison with all its figures, or of several one line each."""
    settings = settings_of(result["rows"])
    table = _one(settings[0]) if len(settings) == 1 else _many(settings)
    return [*_said(result, settings), "", *table]


def _one(setting: Setting) -> list[str]:
    """Contenders of one run beside each other: rate, spread, memory, roofline, parity."""
    header = ["contender", "images/s", "ms", "quartiles", "speedup", "peak", "saved",
              "of the roofline", "parity"]  # fmt: skip
    return _markdown(header, [_cells(label, row) for label, row in setting.rows])


def _many(settings: Sequence[Setting]) -> list[str]:
    """Milliseconds of every contender, and fastres over the fastest other one."""
    labels = list(dict.fromkeys(label for setting in settings for label, _ in setting.rows))
    lines = []
    for setting in settings:
        rows, rival = dict(setting.rows), setting.rival
        times = [_ms(rows[label]) if label in rows else "-" for label in labels]
        verdict = f"{MARKS[setting.outcome]} {setting.ratio:.2f}x" if setting.outcome else "-"
        lines.append([setting.title, *times, f"{verdict} {rival[0]}" if rival else verdict])
    return _markdown(["ms", *labels, "fastres over the fastest other"], lines)


def _ms(row: Row) -> str:
    """The median, or that there is none because of parity."""
    return f"{row['ms']:.4g}" if row["ms"] else "✗" if failed(row) else "-"


def _said(result: Mapping[str, Any], settings: Sequence[Setting]) -> list[str]:
    names = ("gpu", "cpu") if result.get("gpu") else ("cpu",)
    machine = [str(result[name]) for name in names if result.get(name)]
    versions = [f"{name} {result[name]}" for name in ("torch", "triton") if result.get(name)]
    commit = [f"commit {result['commit']}"] if result.get("commit") else []
    where = ", ".join([*machine, *versions, *commit, *shared(result["rows"])])
    command = f" `{result['command']}`" if result.get("command") else ""
    return [f"**{headline(settings)}.** {where}; medians of alternating rounds.{command}"]


def _cells(label: str, row: Row) -> list[str]:
    rate, share, speedup = row["images_per_s"], row["share"], row["speedup"]
    parity = "-" if row["parity"] is None else "✗" if failed(row) else "✓"
    spread = (row["low"], row["high"])
    return [
        label,
        "-" if rate is None else figure_text(rate),
        _ms(row) if row["ms"] else "-",
        "-" if None in spread else "{:.4g} to {:.4g}".format(*spread),
        "-" if speedup is None else f"{speedup:.2f}x",
        memory_text(row["peak_bytes"]),
        memory_text(row["saved_bytes"]),
        "-" if share is None else f"{share:.0%}",
        # What has no speed says why.
        parity if row["ms"] else f"{parity} {row['parity'] if failed(row) else row['note'] or ''}",
    ]


# ---------------------------------------------------------------- results of before there were rows


def _blocks(result: Mapping[str, Any]) -> list[str]:
    """Blocks, then kernels, of a result that has them in lists of their own."""
    said = (
        f"{result['cpu']}, {result['threads']} threads, torch {result['torch']}, "
        f"{result['blocks'][0]['dtype']}, channels_last, batch 16; bottleneck blocks, "
        "milliseconds, medians of alternating rounds. *kept*: glibc told to keep freed memory."
    )
    cells = {(row["block"], row["mode"], row["contender"]): row for row in result["blocks"]}
    header = ["block", "eager", "fastres", "speedup", "eager, kept", "fastres, kept",
              "speedup, kept", "over convolutions, kept", "eval speedup", "saved MB, eager",
              "saved MB, fastres"]  # fmt: skip
    names = dict.fromkeys(row["block"] for row in result["blocks"])
    table = _markdown(header, [_block(name, cells) for name in names])
    return [said, "", *table, "", *_kernels(result["kernels"])]


def _block(block: str, cells: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> list[str]:
    def ms(contender: str, mode: str = "train") -> float:
        return float(cells[block, mode, contender]["ms"])

    def ratio(a: str, b: str, mode: str = "train") -> str:
        return f"{ms(a, mode) / ms(b, mode):.2f}x"

    saved = [cells[block, "saved", name]["bytes"] / 1e6 for name in ("eager", "fastres")]
    return [
        block,
        f"{ms('eager'):.1f}",
        f"{ms('fastres'):.1f}",
        ratio("eager", "fastres"),
        f"{ms('eager, kept'):.1f}",
        f"{ms('fastres, kept'):.1f}",
        ratio("eager, kept", "fastres, kept"),
        ratio("fastres, kept", "convolutions, kept"),
        ratio("eager", "fastres", "infer"),
        *(f"{megabytes:.0f}" for megabytes in saved),
    ]


def _kernels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {(row["kernel"], row["shape"], row["dtype"]): row["over_copy"] for row in rows}
    shapes = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    kernels = dict.fromkeys(row["kernel"] for row in rows)
    cells = [[f"`{k}`", *(f"{found[k, s, d]:.2f}x" for s, d in shapes)] for k in kernels]
    header = ["kernel", *(f"{shape} {dtype}" for shape, dtype in shapes)]
    return [
        "Fused kernels, time over that of copying as many bytes:",
        "",
        *_markdown(header, cells),
    ]


def _block_table(result: Mapping[str, Any]) -> list[str]:
    return _blocks(result) if "blocks" in result else _rows(result)


#: What may stand after `bench:begin`: the lines of its table.
TABLES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "block": _block_table,
    "model": _rows,
    "train": _rows,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
