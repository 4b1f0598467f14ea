"""Bars of a report: comparisons at a glance, speed, memory, layers.

Every bar carries its figure in writing, and colours never carry a meaning alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import plot
from .comparison import Setting, competes, is_ours, silence, speed, spread
from .plot import BAD, GOOD, INK, LINE, OTHER, OURS, PALE, PAPER, SOFT, Drawing, unit_of
from .results import Row, failed, memory_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Pixels of one contender with its name above its bar, of one layer, of one comparison.
BAR, LAYER, RATIO = 42, 21, 32
#: Of a panel's title, of its axis, and of a letter at most.
TITLE, AXIS, LETTER = 28, 44, 7.6
#: Comparisons with a panel of their own; beyond that the glance and the table have them. And those
#: of which the glance has a line each.
MOST, MOST_AT_A_GLANCE = 40, 120
OUTCOMES = {"faster": (GOOD, "^"), "level": (OTHER, "o"), "slower": (BAD, "v")}

# ---------------------------------------------------------------- comparisons at a glance


def ratios_of(settings: Sequence[Setting]) -> Drawing | None:
    """fastres against the fastest other contender of each comparison, where there are several."""
    known = [s for s in settings if s.ratio is not None]
    if not 2 <= len(known) <= MOST_AT_A_GLANCE:
        return None
    ratios = [s.ratio or 1.0 for s in known]
    low, high = min(*ratios, 0.95) / 1.03, max(*ratios, 1.05)
    beside = min(LETTER * max(len(s.title) for s in known) + 20, 560)

    def draw(narrow: bool) -> Figure:
        height = BAR if narrow else RATIO
        figure, (axes,) = plot.panels([height * len(known) + AXIS + 22], narrow)
        plot.inset(axes, left=8 if narrow else beside, right=8, bottom=AXIS, top=22)
        for i, setting in enumerate(known):
            _ratio(axes, len(known) - 1 - i, setting, narrow)
        axes.set_xscale("log")
        # The labels stand to the right of the longest bar.
        width, letters = plot.width_of(axes), max(len(_over(s)) for s in known)
        room = width / max(width - LETTER * letters - 16, width / 4)
        axes.set_xlim(low, low * (high / low) ** room)
        axes.set_ylim(-0.5, len(known) - 0.3)
        _ratio_axis(axes)
        return figure

    return Drawing("ratios", "fastres against the fastest of the others",
                   "Speed of fastres over that of the fastest other contender. Right of the line "
                   "fastres is faster (▲), left of it slower (▼); ● is level: medians within "
                   "3%, or quartiles that overlap.", draw)  # fmt: skip


def _ratio(axes: Axes, y: float, setting: Setting, narrow: bool) -> None:
    ratio = setting.ratio or 1.0
    colour, marker = OUTCOMES[setting.outcome or "level"]
    bar = y - 0.15 if narrow else y
    axes.plot([1, ratio], [bar, bar], color=colour, linewidth=5, solid_capstyle="butt")
    axes.plot([ratio], [bar], color=colour, marker=marker, markersize=10)
    title: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
    if narrow:  # above the bar, and over the line of 1x
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
        axes.text(0, y + 0.25, _cut(setting.title, axes), bbox=box, **title)
    else:
        axes.text(-0.015, y, setting.title, ha="right", **title)
    _beside(axes, max(ratio, 1), bar, _over(setting), setting.outcome != "level", 12)


def _over(setting: Setting) -> str:
    return f"{setting.ratio:.2f}x over {setting.baseline[0] if setting.baseline else ''}"


def _ratio_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axes.get_xlim()
    steps = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    axes.xaxis.set_major_locator(steps if high < 4 * low else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel("speed of fastres / speed of the other")


# ---------------------------------------------------------------- speed and memory


@dataclass(frozen=True)
class _Bars:
    """How a row becomes a bar."""

    unit: str
    reach: Callable[[Row], float]
    label: Callable[[Row], str]
    draw: Callable[[Axes, float, Row], None]


def speed_of(settings: Sequence[Setting]) -> Drawing | None:
    """Images or steps per second of every contender; who has none says why."""
    if not any(s.timed for s in settings) or len(settings) > MOST:
        return None
    rate = all(row["batch"] for s in settings for _, row in s.timed)
    unit = "images per second" if rate else "steps per second"
    bars = _Bars(f"{unit} (longer is better)", _quickest, _speed_label, _speed_bar)
    limits = any(not competes(row) for s in settings for _, row in s.timed)
    return Drawing("speed", "Speed",
                   f"{unit.capitalize()}, medians; whiskers span the quartiles. The second figure "
                   "is the speedup over the first contender. What failed parity has no speed."
                   + " Pale: a part of the work, timed as a bound." * limits,
                   lambda narrow: _panels(settings, bars, narrow))  # fmt: skip


def _quickest(row: Row) -> float:
    return spread(row)[1] if speed(row) is not None else 0.0


def _speed_label(row: Row) -> str:
    value = speed(row)
    if value is None:
        return ""
    return figure_text(value) + (f" · {row['speedup']:.2f}x" if row["speedup"] else "")


def figure_text(value: float) -> str:
    """A rate with as many digits as it is good for."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _speed_bar(axes: Axes, y: float, row: Row) -> None:
    value = speed(row)
    if value is None:
        _say_nothing(axes, y, row)
        return
    low, high = spread(row)
    axes.barh(y, value, 0.44, color=_colour(row), zorder=2)
    axes.plot([low, high], [y, y], color=INK, linewidth=1.3, zorder=3)
    axes.plot([low, high], [y, y], "|", color=INK, markersize=8, zorder=3)


def memory_of(settings: Sequence[Setting]) -> Drawing | None:
    """Peak and saved memory of every contender that has them."""
    kept = [
        Setting(s.title, tuple(pair for pair in s.rows if _most(pair[1])))
        for s in settings
        if any(_most(row) for _, row in s.rows)
    ]
    if not kept or len(kept) > MOST:
        return None
    size, unit = unit_of([_most(row) for s in kept for _, row in s.rows])

    def bar(axes: Axes, y: float, row: Row) -> None:
        axes.barh(y, (row["peak_bytes"] or 0) / size, 0.44, color=_colour(row), alpha=0.45)
        axes.barh(y, (row["saved_bytes"] or 0) / size, 0.2, color=_colour(row), zorder=3)

    bars = _Bars(f"{unit} (shorter is better)", lambda row: _most(row) / size, _memory_label, bar)
    return Drawing("memory", "Memory",
                   "Pale, broad: peak of the step. Solid, slim: what the forward pass saves for "
                   "the backward pass.", lambda narrow: _panels(kept, bars, narrow))  # fmt: skip


def _most(row: Row) -> float:
    return float(max(row["peak_bytes"] or 0, row["saved_bytes"] or 0))


def _memory_label(row: Row) -> str:
    parts = [memory_text(row["peak_bytes"])] if row["peak_bytes"] else []
    parts += [f"{memory_text(row['saved_bytes'])} saved"] if row["saved_bytes"] else []
    return ", ".join(parts)


def _panels(settings: Sequence[Setting], bars: _Bars, narrow: bool) -> Figure:
    """One panel per comparison, one bar per contender, its name above it."""
    heights = [TITLE + BAR * len(s.rows) + AXIS + 10 for s in settings]
    figure, panels = plot.panels(heights, narrow)
    for axes, setting in zip(panels, settings, strict=True):
        plot.inset(axes, left=5, right=16, top=TITLE, bottom=AXIS + 10)
        where = axes.get_yaxis_transform()
        for i, (label, row) in enumerate(reversed(setting.rows)):
            weight = "bold" if is_ours(row) else "normal"
            axes.text(0, i + 0.79, label, transform=where, va="center", fontweight=weight)
            bars.draw(axes, i + 0.37, row)
            _beside(axes, bars.reach(row), i + 0.37, bars.label(row), is_ours(row))
        axes.set_ylim(-0.1, len(setting.rows))
        axes.set_xlim(0, _room(axes, bars, setting))
        axes.set_title(setting.title, loc="left", fontsize=13, fontweight="bold", pad=8, color=INK)
        _plain_axis(axes, bars.unit)
    return figure


def _room(axes: Axes, bars: _Bars, setting: Setting) -> float:
    """The axis' end: beyond the longest bar there is room for the longest label."""
    longest = max([bars.reach(row) for _, row in setting.rows], default=0) or 1.0
    letters = max(len(bars.label(row)) for _, row in setting.rows)
    width = plot.width_of(axes)
    return longest * width / max(width - LETTER * letters - 14, width / 4)


def _plain_axis(axes: Axes, unit: str) -> None:
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel(unit)
    axes.grid(axis="x")


def _beside(axes: Axes, x: float, y: float, label: str, bold: bool, gap: float = 7) -> None:
    axes.annotate(
        label, (x, y), (gap, 0), textcoords="offset points", va="center", fontsize=12,
        fontweight="bold" if bold else "normal", zorder=4,
    )  # fmt: skip


def _say_nothing(axes: Axes, y: float, row: Row) -> None:
    text = _cut(("✕ " if failed(row) else "") + silence(row), axes)
    axes.text(
        0, y, text, transform=axes.get_yaxis_transform(),
        va="center", style="italic", fontsize=11.5, color=BAD if failed(row) else SOFT,
    )  # fmt: skip


def _cut(text: str, axes: Axes) -> str:
    """As much of a text as there is room for."""
    letters = int(plot.width_of(axes) / (LETTER - 0.4))
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "…"


def _colour(row: Row) -> str:
    return OURS if is_ours(row) else OTHER if competes(row) else PALE


# ---------------------------------------------------------------- layers


def layers_of(layers: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Each layer's time, where there is one, beside the least that the hardware allows."""
    ours = [one for one in layers if _whose(one).startswith("fastres")]
    kept = [one for one in ours or layers if one.get("ms") or one.get("bound_ms")]
    if not kept:
        return None
    others = _other_layers(layers) if ours else {}
    extra = " ◆ is the fastest other contender." if others else ""
    if {one.get("mode") for one in kept} == {"train"}:
        extra += " In training, forward and backward."
    return Drawing("layers", "Layers, and what the hardware allows",
                   "Solid: the least that the measured bandwidth and arithmetic peak allow. Pale: "
                   f"what the layer took. The percentage is the bound's share of it.{extra}",
                   lambda narrow: _layer_panels(kept, others, narrow))  # fmt: skip


def _layer_panels(
    kept: Sequence[Mapping[str, Any]], others: Mapping[str, float], narrow: bool
) -> Figure:
    size = len(kept) if narrow or len(kept) < 12 else -(-len(kept) // 2)
    parts = [kept[i : i + size] for i in range(0, len(kept), size)]
    figure, panels = plot.panels([float(LAYER * size + AXIS + 8)] * len(parts), narrow)
    times = [one.get(key) or 0.0 for one in kept for key in ("ms", "bound_ms")]
    reach = max([*times, *others.values()])
    for axes, part in zip(panels, parts, strict=True):
        plot.inset(axes, left=136, right=6, bottom=AXIS, top=8)
        places = range(size - 1, size - 1 - len(part), -1)
        for y, one in zip(places, part, strict=True):
            _layer(axes, y, one, others.get(_layer_name(one)))
        axes.set_xlim(0, reach * (1.8 if narrow else 1.35))
        axes.set_ylim(-0.7, size - 0.4)
        _plain_axis(axes, "ms per step (shorter is better)")
        axes.set_yticks(places, [_short(_layer_name(one)) for one in part])
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=11.5)
    return figure


def _whose(one: Mapping[str, Any]) -> str:
    return str(one.get("contender") or "fastres")


def _layer_name(one: Mapping[str, Any]) -> str:
    return str(one.get("name") or one.get("subject") or "")


def _short(name: str, letters: int = 19) -> str:
    """A name's end, which tells layers apart."""
    return name if len(name) <= letters else "…" + name[1 - letters :]


def _other_layers(layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The fastest time of anyone else by layer."""
    milliseconds: dict[str, float] = {}
    for one in layers:
        if one.get("ms") and not _whose(one).startswith("fastres"):
            name = _layer_name(one)
            milliseconds[name] = min(milliseconds.get(name, math.inf), one["ms"])
    return milliseconds


def _layer(axes: Axes, y: float, one: Mapping[str, Any], other: float | None) -> None:
    ms, bound = one.get("ms") or 0.0, one.get("bound_ms") or 0.0
    axes.barh(y, ms, 0.62, color=OURS, alpha=0.4, zorder=2)
    axes.barh(y, bound, 0.62, color=OURS, zorder=3)
    if other:
        axes.plot([other], [y], "D", color=SOFT, markersize=6, zorder=4, markeredgecolor=LINE)
    label = f"{ms:.3g} ms" + (f" · {bound / ms:.0%}" if bound else "") if ms else f"{bound:.3g} ms"
    where = axes.get_yaxis_transform()
    axes.text(1, y, label, transform=where, ha="right", va="center", fontsize=11.5)
