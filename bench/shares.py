"""Single kernels: how near each comes to the speed of a copy, by primitive and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from . import plot
from .comparison import Setting
from .plot import GOOD, INK, OURS, Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Tensors of fewer bytes measure the call, not the memory.
LEAST_BYTES = 1e6
#: Pixels of a bar, of a panel's title, of its axis, and beside it for the shapes.
BAR, TITLE, AXIS, BESIDE = 21, 28, 44, 126

Shares = Mapping[str, Mapping[str, float]]


def kernel_shares(settings: Sequence[Setting]) -> Shares:
    """Primitive -> shape -> our share of a copy's speed, the median over the call's variants."""
    shares: dict[str, dict[str, list[float]]] = {}
    for setting in settings:
        if setting.ours is None or setting.ours[1]["kind"] != "kernel":
            continue
        row = setting.ours[1]
        if row["share"] and (row["bytes"] or 0) >= LEAST_BYTES:
            primitive, *_, shape = row["subject"].split(", ")
            shares.setdefault(primitive, {}).setdefault(shape, []).append(row["share"])
    return {p: {s: median(v) for s, v in shapes.items()} for p, shapes in shares.items()}


def shares_of(settings: Sequence[Setting]) -> Drawing | None:
    """A panel of bars for each primitive."""
    shares = kernel_shares(settings)
    if not shares:
        return None
    return Drawing("shares", "Kernels beside a copy",
                   "Speed of the fastest kernel of fastres over that of copying as many bytes, "
                   "median over the variants of the call. At the line it is as fast as memory; "
                   "beyond it, what was in cache need not come from memory.",
                   lambda narrow: _panels(shares, narrow))  # fmt: skip


def _panels(shares: Shares, narrow: bool) -> Figure:
    heights = [float(BAR * len(shapes) + TITLE + AXIS) for shapes in shares.values()]
    figure, panels = plot.panels(heights, narrow)
    reach = max(1.0, *(share for shapes in shares.values() for share in shapes.values()))
    for axes, (primitive, shapes) in zip(panels, shares.items(), strict=True):
        plot.inset(axes, left=BESIDE, right=8, top=TITLE, bottom=AXIS)
        _panel(axes, primitive, shapes)
        axes.set_xlim(0, reach * 1.25)
    return figure


def _panel(axes: Axes, primitive: str, shapes: Mapping[str, float]) -> None:
    places = range(len(shapes) - 1, -1, -1)
    axes.barh(places, list(shapes.values()), 0.62, color=OURS, zorder=2)
    axes.axvline(1, color=GOOD, linewidth=1.4, zorder=3)
    edge = axes.get_yaxis_transform()
    for y, share in zip(places, shapes.values(), strict=True):
        axes.text(1, y, f"{share:.0%}", transform=edge, ha="right", va="center", fontsize=11.5)
    axes.set_title(primitive, loc="left", x=-BESIDE / plot.width_of(axes), fontweight="bold")
    axes.set_yticks(places, list(shapes))
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=11.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.locator_params(axis="x", nbins=5)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.7, len(shapes) - 0.3)
    axes.set_xlabel("of a copy's speed (longer is better)")
    axes.grid(axis="x")
