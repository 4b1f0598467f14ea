"""`python -m bench readme`: README.md's tables, from the result files that it names itself.

A table stands between `<!-- bench:begin KIND FILE -->` and `<!-- bench:end -->`; FILE is a result
below the repository's top. `--use FILE` lets README name another one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastres.cli.errors import CommandError

from .bars import figure_text
from .comparison import Setting, is_ours, settings_of
from .conditions import ROOT
from .results import Row, failed, memory_text, read, way_of
from .shares import kernel_shares
from .summary import headline, shared

#: Conditions that the line above a table names, where they are there.
VERSIONS = ("torch", "triton", "onnxruntime", "openvino")
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
    kind = result["rows"][0]["kind"]
    begin = rf"<!-- bench:begin {re.escape(kind)} \S+ -->"
    if not re.search(begin, text):
        raise CommandError(f"README.md must have a table of {kind}, got none for {path}")
    new = f"<!-- bench:begin {kind} {here.relative_to(top.resolve()).as_posix()} -->"
    return re.sub(begin, lambda _: new, text)


def _read(path: Path) -> dict[str, Any]:
    """A result with rows."""
    try:
        result = read(path)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if not result["rows"]:
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
    """Milliseconds of every contender, and fastres over eager and over the fastest other one."""
    labels = list(dict.fromkeys(label for setting in settings for label, _ in setting.rows))
    lines = []
    for setting in settings:
        rows, baseline = dict(setting.rows), setting.baseline
        times = [_ms(rows[label]) if label in rows else "-" for label in labels]
        mark = f"{MARKS[setting.outcome]} {setting.ratio:.2f}x" if setting.outcome else "-"
        beside = f"{mark} {baseline[0]}" if baseline else mark
        lines.append([setting.title, *times, _over_eager(setting), beside])
    return _markdown(["ms", *labels, "fastres over eager", "over the fastest other"], lines)


def _over_eager(setting: Setting) -> str:
    speedup = setting.ours[1]["speedup"] if setting.ours else None
    known = speedup is not None and any(row["contender"] == "eager" for _, row in setting.timed)
    return f"{speedup:.2f}x" if known else "-"


def _ms(row: Row) -> str:
    """The median, or that there is none because of parity."""
    return f"{row['ms']:.4g}" if row["ms"] else "✗" if failed(row) else "-"


def _said(result: Mapping[str, Any], settings: Sequence[Setting]) -> list[str]:
    names = ("gpu", "cpu") if result.get("gpu") else ("cpu",)
    machine = [str(result[name]) for name in names if result.get(name)]
    versions = [f"{name} {result[name]}" for name in VERSIONS if result.get(name)]
    commit = [f"commit {result['commit']}"] if result.get("commit") else []
    where = ", ".join([*machine, *versions, *commit, *shared(result["rows"])])
    command = f" `{result['command']}`" if result.get("command") else ""
    claim = f"**{headline(settings)}.** " if settings else ""
    return [f"{claim}{where}; medians of alternating rounds.{command}"]


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


# ---------------------------------------------------------------- many comparisons


def _pivot(result: Mapping[str, Any]) -> list[str]:
    """Blocks or convolutions: a line each, and fastres over the fastest other one in each mode."""
    settings = settings_of(result["rows"])
    by_place = {(_first(s)["subject"], way_of(_first(s))): s for s in settings}
    ways = list(dict.fromkeys(way for _, way in by_place))
    subjects = dict.fromkeys(subject for subject, _ in by_place)
    lines = [
        [subject, *(_verdict(by_place.get((subject, way))) for way in ways)] for subject in subjects
    ]
    kind = result["rows"][0]["kind"]
    said = "Each cell: fastres over the fastest other contender, its milliseconds, who that is."
    return [*_said(result, settings), said, "", *_markdown([kind, *ways], lines)]


def _first(setting: Setting) -> Row:
    return setting.rows[0][1]


def _verdict(setting: Setting | None) -> str:
    """A comparison in one cell."""
    if setting is None:
        return "-"
    if any(is_ours(row) and failed(row) for _, row in setting.rows):
        return "✗ parity"
    if setting.ours is None:
        return "-"
    ms = f"{setting.ours[1]['ms']:.4g} ms"
    if setting.baseline is None or setting.outcome is None:
        return ms
    return f"{MARKS[setting.outcome]} {setting.ratio:.2f}x, {ms} ({setting.baseline[0]})"


def _kernels(result: Mapping[str, Any]) -> list[str]:
    """Primitives and shapes: our share of a copy's speed."""
    shares = kernel_shares(settings_of(result["rows"]))
    shapes = list(dict.fromkeys(shape for by_shape in shares.values() for shape in by_shape))
    lines = [
        [
            f"`{primitive}`",
            *(f"{by_shape[s]:.0%}" if s in by_shape else "-" for s in shapes),
        ]
        for primitive, by_shape in shares.items()
    ]
    said = "Share of the speed at which as many bytes are copied, median over a kernel's variants."
    return [*_said(result, []), said, "", *_markdown(["kernel", *shapes], lines)]


#: What may stand after `bench:begin`: the lines of its table.
TABLES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "kernel": _kernels,
    "conv": _pivot,
    "block": _pivot,
    "model": _rows,
    "train": _rows,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
