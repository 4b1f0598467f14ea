"""Line plots as inline SVG: no image file, no script, sharp at every width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 34, 42


@dataclass(frozen=True)
class Line:
    """One curve: its legend, its points, and its CSS class (`style.css` in the report)."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str


@dataclass(frozen=True)
class Axes:
    """Titles and ranges; `log` makes the vertical axis logarithmic."""

    title: str
    x_label: str
    y_label: str
    log: bool = False


def svg(axes: Axes, lines: Sequence[Line]) -> str:
    """One plot with axes, grid, legend and a description for those who cannot see it."""
    scale = _Scale(axes, [p for line in lines for p in line.points])
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(axes.title)}">',
        *_grid(axes, scale),
        *(_curve(line, scale) for line in lines),
        *_legend(lines),
        "</svg>",
    ]
    return "\n".join(parts)


class _Scale:
    """Maps data to the drawing."""

    def __init__(self, axes: Axes, points: Sequence[tuple[float, float]]) -> None:
        self.log = axes.log
        drawable = [(x, y) for x, y in points if self._drawable(y)] or [(0.0, 1.0), (1.0, 1.0)]
        xs, ys = [x for x, _ in drawable], [self._y(y) for _, y in drawable]
        self.x_low, self.x_high = min(xs), max(*xs, min(xs) + 1e-9)
        # A linear axis starts at zero; a logarithmic one at a whole power of ten.
        self.y_low = math.floor(min(ys)) if axes.log else 0.0
        self.y_high = math.ceil(max(ys)) if axes.log else max(ys) * 1.05
        self.y_high = max(self.y_high, self.y_low + 1e-9)

    def _drawable(self, y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not self.log)

    def _y(self, y: float) -> float:
        return math.log10(y) if self.log else y

    def place(self, x: float, y: float) -> tuple[float, float] | None:
        """Where a point is drawn; None for what this axis cannot show."""
        if not self._drawable(y):
            return None
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = (self._y(y) - self.y_low) / (self.y_high - self.y_low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    def y_ticks(self) -> list[float]:
        """Values for horizontal grid lines."""
        if not self.log:
            return ticks(self.y_low, self.y_high)
        exponents = range(int(self.y_low), int(self.y_high) + 1)
        stride = max(1, len(exponents) // 6)
        return [10.0**e for e in exponents[::stride]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values between low and high, about that many."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(axes: Axes, scale: _Scale) -> list[str]:
    parts = []
    for value in scale.y_ticks():
        point = scale.place(scale.x_low, value)
        if point is not None:
            y = point[1]
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            label = f"1e{round(math.log10(value))}" if axes.log else f"{value:g}"
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{label}</text>')
    bottom = HEIGHT - BOTTOM
    for value in ticks(scale.x_low, scale.x_high):
        across = (value - scale.x_low) / (scale.x_high - scale.x_low)
        x = LEFT + across * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="middle">{value:g}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    x_middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{x_middle}" y="{HEIGHT - 6}" class="middle">{escape(axes.x_label)}</text>'
        f'<text transform="translate(12 {middle}) rotate(-90)" class="middle">'
        f"{escape(axes.y_label)}</text>"
    )
    return parts


def _curve(line: Line, scale: _Scale) -> str:
    placed = [p for p in (scale.place(x, y) for x, y in line.points) if p is not None]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    return f'<path class="line {line.style}" d="M{path}"/>' if placed else ""


def _legend(lines: Sequence[Line]) -> list[str]:
    """In one row above the plot, where no curve can cross it."""
    parts, x = [], float(LEFT)
    for line in lines:
        parts.append(f'<path class="line {line.style}" d="M{x:.0f} 14h28"/>')
        parts.append(f'<text x="{x + 34:.0f}" y="18">{escape(line.label)}</text>')
        x += 34 + 7.5 * len(line.label) + 14
    return parts
