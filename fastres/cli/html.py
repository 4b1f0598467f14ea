"""What every page that fastres writes has in common: one file, no script, nothing from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

#: Light and dark as the reader's system asks for. Colours never carry a meaning alone.
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d5dae1;
  --paper: #fff; --raised: #f4f6f8; --stock: #1f6fb4; --fused: #d9560b; --good: #17733a;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #39424e;
  --paper: #12161c; --raised: #1b2129; --stock: #6db3ee; --fused: #ff9a5c; --good: #6fcf8e;
  --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 46rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .5rem 0; } .soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; } svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } .figures td, .figures th { font-variant-numeric: tabular-nums; }
.figures :is(td, th):not(:first-child) { text-align: right; }
.good { color: var(--good); } .bad { color: var(--bad); } .good, .bad { font-weight: 600; }
code { font-size: .9em; white-space: nowrap; }
"""


def page(title: str, sections: Iterable[str], style: str = "") -> str:
    """A whole page as HTML that refers to nothing outside itself.

    Args:
        title: as text.
        sections: as HTML, in order; empty ones leave nothing behind.
        style: CSS of this page, after the common one.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "figures") -> str:
    """A table that scrolls inside its own box where the screen is narrower than it.

    Args:
        header: one text per column.
        rows: cells as HTML; escape what is not.
        kind: CSS class; "figures" aligns all but the first column right.
    """
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n" for cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def mark(good: bool, text: str) -> str:
    """A text in the colour of what holds, or of what does not."""
    return f'<span class="{"good" if good else "bad"}">{escape(text)}</span>'
