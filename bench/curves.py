"""Lines of a report: memory and speed against the batch size, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from . import plot
from .comparison import speed
from .plot import Drawing, unit_of
from .results import Row, subject_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: "seconds", "loss" and "accuracy" of one contender; null for what overflowed.
Curve = Mapping[str, Sequence[float | None]]


def batches_of(rows: Sequence[Row]) -> list[Drawing]:
    """Memory, and speed, against the batch size, where several were measured."""
    key = "peak_bytes" if any(row["peak_bytes"] for row in rows) else "saved_bytes"
    memory = [cast(Mapping[str, Any], row)[key] or 0 for row in rows]
    size, unit = unit_of(memory)
    said = "Peak of a step." if key == "peak_bytes" else "What is saved for the backward pass."
    drawings = [
        _by_batch("memory-by-batch", "Memory against batch size", unit, said,
                  [(row, count / size) for row, count in zip(rows, memory, strict=True)]),
        _by_batch("speed-by-batch", "Speed against batch size", "images per second", "Medians.",
                  [(row, speed(row) or 0.0) for row in rows]),
    ]  # fmt: skip
    return [drawing for drawing in drawings if drawing is not None]


def _by_batch(
    name: str, title: str, unit: str, caption: str, values: Sequence[tuple[Row, float]]
) -> Drawing | None:
    """A panel per subject and mode, a line per contender; None where nobody ran two batches."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row, value in values:
        if row["batch"] and value:
            lines = panels.setdefault(subject_of(row), {})
            lines.setdefault(row["contender"], []).append((row["batch"], value))
    if not any(len({x for x, _ in ps}) > 1 for lines in panels.values() for ps in lines.values()):
        return None
    return Drawing(name, title, caption, lambda narrow: _lines(panels, unit, narrow))


def _lines(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], unit: str, narrow: bool
) -> Figure:
    styles = plot.series(label for lines in panels.values() for label in lines)
    figure, all_axes = _framed(list(panels), len(styles), narrow)
    for axes, lines in zip(all_axes, panels.values(), strict=True):
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), label=label, linewidth=2, markersize=6,
                      **styles[label])  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
        axes.set_xlabel("batch")
        axes.set_ylabel(unit)
    plot.legend(figure, all_axes, narrow)
    return figure


def _framed(titles: Sequence[str], labels: int, narrow: bool) -> tuple[Figure, list[Axes]]:
    """Panels for lines below room for a legend."""
    top = plot.legend_height(labels, narrow)
    figure, panels = plot.panels(
        [300.0] * len(titles), narrow, top, beside=3 if len(titles) == 3 else 2
    )
    for axes, title in zip(panels, titles, strict=True):
        plot.inset(axes, left=70, right=10, top=30, bottom=54)
        axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=plot.INK)
        axes.grid()
    return figure, panels


# ---------------------------------------------------------------- learning curves


def curves_of(curves: Mapping[str, Curve]) -> Drawing | None:
    """Loss over steps, loss and accuracy over seconds, of every contender."""
    wanted = (("loss", "steps"), ("loss", "seconds"), ("accuracy", "seconds"))
    shown = [w for w in wanted if any(points_of(curve, *w) for curve in curves.values())]
    if not shown:
        return None
    styles = plot.series(curves)

    def draw(narrow: bool) -> Figure:
        titles = [f"{what} over {over}" for what, over in shown]
        figure, all_axes = _framed(titles, len(styles), narrow)
        for axes, (what, over) in zip(all_axes, shown, strict=True):
            for label, curve in curves.items():
                _curve(axes, points_of(curve, what, over), label, styles[label])
            axes.set_xlabel(over)
            axes.set_ylabel(what)
        plot.legend(figure, all_axes, narrow)
        return figure

    return Drawing("curves", "Learning curves",
                   "Over steps the curves should coincide; over seconds the faster one is ahead. "
                   "Faint: every step; strong: the mean of its neighbourhood.", draw)  # fmt: skip


def points_of(curve: Curve, what: str, over: str) -> list[tuple[float, float]]:
    """The points of one curve; what overflowed is left out.

    Args:
        curve: "seconds" since the start at each step, "loss" at each step, "accuracy" at each
            step or, where it is shorter, at the end of as many equal parts.
        what: "loss" or "accuracy".
        over: "steps" or "seconds".
    """
    values, seconds = curve.get(what) or [], curve.get("seconds") or []
    if not values or (over == "seconds" and not seconds):
        return []
    steps = len(curve.get("loss") or values) / len(values)
    places = [round((i + 1) * steps) for i in range(len(values))]
    if over == "seconds":
        each = len(seconds) / len(values)
        times = [seconds[min(round((i + 1) * each), len(seconds)) - 1] for i in range(len(values))]
    else:
        times = list(places)
    return [(x, y) for x, y in zip(times, values, strict=True) if x is not None and y is not None]


def _curve(
    axes: Axes, points: list[tuple[float, float]], label: str, style: Mapping[str, Any]
) -> None:
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    few = len(points) <= 40
    marker = {**style, "marker": style["marker"] if few else None, "markersize": 5}
    if not few:
        axes.plot(xs, ys, color=style["color"], alpha=0.25, linewidth=0.8)
    axes.plot(xs, _smooth(ys, 1 if few else len(ys) // 40), label=label, linewidth=2, **marker)


def _smooth(values: Sequence[float], reach: int) -> list[float]:
    """Each value's mean with its neighbours up to half of `reach` away."""
    half = reach // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
