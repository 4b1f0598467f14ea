"""What all figures of a report share: sizes in pixels, colours that follow the page, panels."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Widths in CSS pixels of a figure for a desktop and for a phone: a page carries both, so that
#: letters have the same size on each.
WIDE, NARROW = 1040, 358
#: Panels beside one another, and the space between them.
COLUMNS, GAP = 2, 36

#: What a figure is drawn in, and where the page says otherwise (dark): its own colour.
INK, SOFT, LINE, PAPER = "#1c2430", "#5b6675", "#d5dae1", "#ffffff"
OURS, OTHER, PALE, GOOD, BAD = "#d9560b", "#7d8896", "#b9c1cb", "#17733a", "#b3261e"
#: Contenders' curves: told apart by colour-blind readers too, and by dashes and markers besides.
SERIES = ("#1f6fb4", "#00796b", "#8e3f9e", "#8a6d00", "#4a5568", "#c2347c", "#2b8fb8")
DASHES = ("--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)), (0, (1, 1)))
MARKERS = "so^Dv<>P"
VARIABLES = {
    INK: "ink", SOFT: "soft", LINE: "line", PAPER: "paper", OURS: "fused", OTHER: "other",
    PALE: "pale", GOOD: "good", BAD: "bad",
    **{colour: f"series-{i}" for i, colour in enumerate(SERIES)},
}  # fmt: skip

#: The colours that `fastres.cli.html` does not have.
STYLE = """
:root { --other: #7d8896; --pale: #b9c1cb; --series-0: #1f6fb4; --series-1: #00796b;
  --series-2: #8e3f9e; --series-3: #8a6d00; --series-4: #4a5568; --series-5: #c2347c;
  --series-6: #2b8fb8; }
@media (prefers-color-scheme: dark) { :root { --other: #8a95a5; --pale: #4b5663;
  --series-0: #6db3ee; --series-1: #4fc9b5; --series-2: #d59ae6; --series-3: #e3c34a;
  --series-4: #b4bfce; --series-5: #ff8fc4; --series-6: #7fd6f7; } }
svg text { font-family: system-ui, sans-serif !important; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg.wide { max-width: 1040px; } svg.narrow { display: none; max-width: 34rem; }
@media (max-width: 820px) { svg.wide { display: none; } svg.narrow { display: block; } }
"""

_SETTINGS = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 12.5, "text.color": INK,
    "axes.edgecolor": SOFT, "axes.labelcolor": SOFT, "axes.labelsize": 12, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "xtick.color": SOFT, "ytick.color": SOFT,
    "xtick.labelsize": 11.5, "ytick.labelsize": 11.5, "grid.color": LINE, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 12, "figure.dpi": 72,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A figure of the page: its file's name, heading, caption, and what draws it, narrow or not."""

    name: str
    title: str
    caption: str
    draw: Callable[[bool], Figure]


@contextmanager
def drawing(seed: str) -> Iterator[None]:
    """matplotlib's settings while figures are made; `seed` makes their identifiers their own."""
    from matplotlib import rc_context

    with rc_context({**_SETTINGS, "svg.hashsalt": seed}):
        yield


def panels(
    heights: Sequence[float], narrow: bool, top: float = 0, beside: int = COLUMNS
) -> tuple[Figure, list[Axes]]:
    """A figure with one axes per height (pixels), in columns, each as high as its row needs.

    Args:
        heights: of the panels, in pixels, with what they write above and below themselves.
        narrow: for a phone: one column.
        top: pixels above them all, for a legend.
        beside: columns where there is room.
    """
    from matplotlib.figure import Figure

    width, columns = (NARROW, 1) if narrow else (WIDE, min(beside, len(heights)))
    rows = list(_chunks(heights, columns))
    total = top + sum(map(max, rows))
    figure = Figure(figsize=(width / 72, total / 72), facecolor="none")
    each = (width - GAP * (columns - 1)) / columns
    frames, y = [], total - top
    for row in rows:
        for i, height in enumerate(row):
            box = (i * (each + GAP) / width, (y - height) / total, each / width, height / total)
            frames.append(figure.add_axes(box))
        y -= max(row)
    return figure, frames


def inset(axes: Axes, left: float = 0, right: float = 0, top: float = 0, bottom: float = 0) -> None:
    """Shrink an axes by so many pixels on each side, for what is written there."""
    width, height = _size(axes)
    box = axes.get_position()
    axes.set_position(
        (
            box.x0 + left / width,
            box.y0 + bottom / height,
            box.width - (left + right) / width,
            box.height - (top + bottom) / height,
        )
    )


def width_of(axes: Axes) -> float:
    """Pixels."""
    return float(axes.get_position().width * _size(axes)[0])


def _size(axes: Axes) -> tuple[float, float]:
    """Of the whole figure, in pixels."""
    width, height = cast("Figure", axes.figure).get_size_inches()
    return 72 * width, 72 * height


def as_svg(figure: Figure, label: str, kind: str) -> str:
    """The figure for inlining: it takes colours and letters from the page around it.

    Args:
        label: for those who cannot see it.
        kind: CSS class, "wide" or "narrow".
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for waste in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        text = re.sub(waste, "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    box = re.search(r'viewBox="[^"]*"', text)
    opening = f'<svg class="{kind}" role="img" aria-label="{escape(label)}" '
    links = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    return opening + f"{box[0] if box else ''} {links}" + text[text.index(">") :]


def as_png(figure: Figure) -> bytes:
    """The figure on white, twice as fine as on a screen."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=144, facecolor=PAPER, metadata={"Software": None})
    return out.getvalue()


def series(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each contender's curve is drawn: fastres solid and in its own colour."""
    styles: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(labels):
        n = sum(1 for known in styles if not known.startswith("fastres"))
        if label.startswith("fastres"):
            k = len(styles) - n
            styles[label] = {
                "color": OURS,
                "linestyle": ("-", *DASHES)[k % 8],
                "marker": MARKERS[k % 8],
            }
        else:
            styles[label] = {
                "color": SERIES[n % 7],
                "linestyle": DASHES[n % 7],
                "marker": MARKERS[(n + 1) % 8],
            }
    return styles


def legend(figure: Figure, found: Sequence[Axes], narrow: bool) -> None:
    """One legend above all panels, where no curve can cross it."""
    pairs = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in found)
    handles = {label: handle for group in pairs for handle, label in group}
    figure.legend(
        handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(0, 1),
        borderaxespad=0, borderpad=0, ncols=2 if narrow else 6, handlelength=3, columnspacing=1.6,
        labelcolor=INK,
    )  # fmt: skip


def legend_height(count: int, narrow: bool) -> float:
    """Pixels that `legend` takes for so many curves."""
    return 20.0 * -(-count // (2 if narrow else 6)) + 10


def unit_of(counts: Sequence[float]) -> tuple[float, str]:
    """What to give these bytes in: its size and its name."""
    return (1e9, "GB") if max(counts, default=0) >= 5e9 else (1e6, "MB")


def _chunks(items: Sequence[float], size: int) -> Iterator[list[float]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
