"""The report of a result: one self-contained page to look at, and its figures as PNG files."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastres.cli import html
from fastres.cli.errors import CommandError

from . import plot
from .bars import figure_text, layers_of, memory_of, ratios_of, speed_of
from .comparison import settings_of
from .curves import batches_of, curves_of
from .plot import Drawing
from .results import COLUMNS, Row, memory_text, name_of, place, read, ready, setting
from .shares import shares_of
from .summary import headline, lead, shared, tiles

STYLE = """
body { max-width: 67rem; padding: 2rem 1rem 3rem; }
.eyebrow { color: var(--soft); margin: 0; } h1 { font-size: clamp(1.6rem, 4.5vw, 2.6rem); }
h1, h2 { text-wrap: balance; } h2 { font-size: 1.3rem; margin-top: 3rem; }
.lead { font-size: 1.05rem; max-width: 46rem; } figcaption { max-width: 46rem; }
figure { margin: .6rem 0 0; } figcaption { margin-top: .6rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.4rem, 1fr)); gap: .8rem;
  margin: 1.5rem 0; padding: 0; list-style: none; }
.tiles li { background: var(--raised); border-radius: .6rem; padding: .8rem 1rem; }
.tiles li { overflow-wrap: anywhere; }
.tiles b { display: block; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.01em; }
.tiles li > span { display: block; font-size: .9rem; } .tiles .what { color: var(--soft); }
.rows { font-size: .88rem; border-collapse: separate; border-spacing: 0; }
.rows .new > td { border-top: 2px solid var(--soft); }
.rows :is(th, td) { padding: .35rem .8rem .35rem 0;
  text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.rows :is(th, td):is(:first-child, .text) { text-align: left; }
.rows :is(th, td):first-child { position: sticky; left: 0; background: var(--paper); }
.rows .note { white-space: normal; min-width: 14rem; text-align: left; }
.rows .parity { white-space: normal; min-width: 7rem; text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--raised); border-radius: .6rem; padding: .8rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; } pre code { white-space: inherit; }
@media (max-width: 820px) { .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; }
  dl { display: block; } dd { margin-bottom: .5rem; }
  .tiles li { padding: .7rem .8rem; } .tiles b { font-size: 1.4rem; } }
"""

#: Parts of a result that are not conditions.
_PARTS = ("rows", "layers", "curves", "command")
#: What a reader looks for first.
_FIRST = ("contender", "subject", "mode", "allocator", "batch", "images_per_s", "speedup", "ms",
          "low", "high", "peak_bytes", "saved_bytes", "share", "parity", "note")  # fmt: skip
_WORDS = {
    "cpu": "CPU", "gpu": "GPU", "bandwidth_gb_s": "bandwidth, measured (GB/s)",
    "peak_tflop_s": "arithmetic peak, measured (TFLOP/s)",
    "allocator": "freed memory",
    "images_per_s": "images/s", "share": "of the bound", "low": "ms, 25 %",
    "high": "ms, 75 %", "ms": "ms", "bound_ms": "bound, ms", "peak_bytes": "peak",
    "saved_bytes": "saved", "bytes": "traffic", "flops": "GFLOP",
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Draw the page of a result that is already there.

    Raises:
        CommandError: where the file is not a result, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(prog="fastres bench report", description=__doc__)
    parser.add_argument("result", type=Path, metavar="FILE", help="a result file")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the result")
    options = parser.parse_args(arguments)
    path: Path = options.result
    try:
        print(write_report(read(path), options.out or path.parent, path.stem))
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    return 0


def write_report(result: Mapping[str, Any], folder: Path | str, name: str | None = None) -> Path:
    """Write a result as a page, with PNG files of its figures beside it.

    Args:
        result: what `results.read` gives. "layers" are dictionaries with "name", "ms" and
            "bound_ms" (ms), and "contender" where it is not fastres; "curves" see
            `curves.points_of`.
        folder: made where it is missing; a report of the same name is replaced.
        name: of the files, without an ending; by default the one `results.name_of` gives.

    Returns: the path of the page. Without matplotlib it has no figures, and says so.

    Raises:
        OSError: where the folder cannot be written to.
    """
    folder, name = ready(folder), name or _name(result)
    figures = Figures(result)
    for drawing, picture in figures.pictures.items():
        place(picture, folder / f"{name}-{drawing}.png", over=True)
    path = folder / f"{name}.html"
    place(page(result, figures.sections), path, over=True)
    return path


def page(result: Mapping[str, Any], figures: Iterable[str]) -> str:
    """The page as HTML.

    Args:
        result: see `write_report`.
        figures: the sections with the figures, as HTML.
    """
    settings = settings_of(result["rows"])
    sections = [
        f'<p class="eyebrow">{escape(_eyebrow(result))}</p>',
        f"<h1>{escape(headline(settings))}</h1>",
        f'<p class="lead">{lead(settings)}</p>',
        tiles(settings),
        *figures,
        _table(result["rows"]),
        _conditions(result),
    ]
    return html.page(f"fastres bench: {headline(settings)}", sections, plot.STYLE + STYLE)


class Figures:
    """The figures of a result as sections of the page, and as PNG files by name."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.pictures: dict[str, bytes] = {}
        self.sections: list[str] = []
        if find_spec("matplotlib") is None:
            missing = "Figures need matplotlib: <code>pip install matplotlib</code>"
            self.sections.append(f'<p class="soft">{missing}</p>')
            return
        for drawing in drawings_of(result):
            self.sections.append(self._section(drawing))

    def _section(self, drawing: Drawing) -> str:
        inline = []
        for kind in ("wide", "narrow"):
            with plot.drawing(f"{drawing.name}-{kind}"):
                figure = drawing.draw(kind == "narrow")
                inline.append(plot.as_svg(figure, drawing.title, kind))
                if kind == "wide":
                    self.pictures[drawing.name] = plot.as_png(figure)
        return (
            f"<h2>{escape(drawing.title)}</h2><figure>{''.join(inline)}"
            f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
        )


def drawings_of(result: Mapping[str, Any]) -> list[Drawing]:
    """The figures that a result has the data for."""
    settings = settings_of(result["rows"])
    drawings = [shares_of(settings), ratios_of(settings), speed_of(settings), memory_of(settings)]
    drawings += [*batches_of(result["rows"]), layers_of(result.get("layers") or [])]
    drawings.append(curves_of(result.get("curves") or {}))
    return [drawing for drawing in drawings if drawing is not None]


# ---------------------------------------------------------------- the table


def _table(rows: Sequence[Row]) -> str:
    """All columns; those with one value throughout, or none, are said above it instead."""
    fields: list[Mapping[str, Any]] = list(rows)
    values = {key: {repr(row.get(key)) for row in fields} for key in COLUMNS}
    same = [k for k in COLUMNS if len(values[k]) == 1 and k not in ("contender", "ms", "parity")]
    order = (*_FIRST, *(k for k in COLUMNS if k not in _FIRST))
    shown = [k for k in order if k not in same]
    common = [f"{_word(k)} {_cell(k, fields[0])}" for k in same if fields[0].get(k) is not None]
    absent = [_word(k) for k in same if fields[0].get(k) is None]
    said = "; ".join(filter(None, (
        f"The same in every row: {', '.join(common)}" if common else "",
        f"not measured, or not applicable: {escape(', '.join(absent))}" if absent else "",
    )))  # fmt: skip
    head = "".join(f'<th scope="col"{_kind(k)}>{escape(_word(k))}</th>' for k in shown)
    body, last = "", setting(rows[0]) if rows else None
    for row, cells in zip(rows, fields, strict=True):
        new = "" if setting(row) == last else ' class="new"'
        last = setting(row)
        body += f"<tr{new}>" + "".join(f"<td{_kind(k)}>{_cell(k, cells)}</td>" for k in shown)
        body += "</tr>\n"
    return (
        f'<h2>All figures</h2><p class="soft">{said}.</p><div class="scroll" tabindex="0">'
        f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _kind(key: str) -> str:
    """The CSS class of a column."""
    if key in ("note", "parity"):
        return f' class="{key}"'
    text = ("kind", "subject", "mode", "dtype", "layout", "backend", "memory", "level", "device")
    return ' class="text"' if key in text else ""


def _word(key: str) -> str:
    return _WORDS.get(key, key.replace("_", " "))


def _cell(key: str, row: Mapping[str, Any]) -> str:
    """One value as HTML."""
    value = row.get(key)
    if value is None:
        return ""
    if key == "contender":
        return f"<strong>{escape(value)}</strong>" if value.startswith("fastres") else escape(value)
    if key == "parity":
        return html.mark(value == "ok", "✓ ok" if value == "ok" else f"✕ {value}")
    if key == "speedup":
        # At two digits it is neither.
        level = f"{value:.2f}" == "1.00"
        text = f"{'' if level else '▲ ' if value > 1 else '▼ '}{value:.2f}x"
        return text if level else html.mark(value > 1, text)
    if key in ("peak_bytes", "saved_bytes", "bytes"):
        return memory_text(value)
    if key == "flops":
        return f"{value / 1e9:,.4g}"
    if key == "share":
        return f"{value:.0%}"
    if key == "images_per_s":
        return f"{value:,.1f}" if value >= 100 else figure_text(value)
    if isinstance(value, float):
        return f"{value:,.2f}" if value >= 1 else f"{value:.4f}"
    return escape(str(value))


# ---------------------------------------------------------------- conditions and files


def _eyebrow(result: Mapping[str, Any]) -> str:
    machine = str(result.get("gpu") or result.get("cpu") or "")
    return " · ".join(filter(None, ("fastres bench", machine, *shared(result["rows"]))))


def _conditions(result: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(_word(key))}</dt><dd>{escape(_plain(value))}</dd>"
        for key, value in result.items()
        if key not in _PARTS and value not in (None, "", [], {})
    )
    command = result.get("command")
    again = f"<p>Run it again:</p><pre><code>{escape(command)}</code></pre>" if command else ""
    return f"<h2>Conditions</h2><dl>{items}</dl>{again}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _name(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    kinds, subjects = (list(dict.fromkeys(row[key] for row in rows)) for key in ("kind", "subject"))
    subject = subjects[0] if len(subjects) == 1 else ""
    return name_of(result, kinds[0] if len(kinds) == 1 else "", subject)
