"""What a result comes to: one sentence, and a few figures to see at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import prod
from statistics import median
from typing import Any, cast

from fastres.cli import html

from .bars import figure_text
from .comparison import Setting, competes, is_ours, silence
from .results import Row, failed, memory_text

#: Losses that the page names above its figures, the largest first.
NAMED = 6
_ARROWS = {"faster": "▲ faster", "level": "● level", "slower": "▼ slower"}


def shared(rows: Sequence[Row]) -> list[str]:
    """What was measured, as far as it is the same in every row."""
    forms = {"subject": "{}", "mode": "{}", "batch": "batch {}", "size": "{} px", "dtype": "{}"}
    parts = []
    for key, form in forms.items():
        values = {cast(Mapping[str, Any], row)[key] for row in rows}
        if len(values) == 1 and values != {None}:
            parts.append(form.format(*values))
    return parts + ["amp"] * all(row["amp"] for row in rows)


def headline(settings: Sequence[Setting]) -> str:
    """The result in one line, a loss said as plainly as a gain."""
    known = [s for s in settings if s.ratio is not None]
    if not known:
        shares = [row["share"] for _, row in _measured(settings) if row["share"]]
        if any(is_ours(row) and failed(row) for s in settings for _, row in s.rows):
            return "fastres failed the parity gate, so it has no speed"
        if shares:
            return f"Median share of the roofline: {median(shares):.0%} ({len(shares)} timed)"
        return "Nothing here to compare fastres with"
    if len(known) > 1:
        words = ("faster", "level", "slower")
        counts = {word: sum(s.outcome == word for s in known) for word in words}
        first, *rest = [(word, n) for word, n in counts.items() if n]
        said = "".join(f", {word} in {n}" for word, n in rest)
        return f"fastres is {first[0]} in {first[1]} of {len(known)} comparisons{said}"
    (setting,) = known
    baseline = setting.baseline[0] if setting.baseline else ""
    if setting.outcome == "level":
        return f"fastres is as fast as {baseline}, within the noise ({setting.ratio:.2f}x)"
    if setting.outcome == "slower":
        return f"fastres is slower than {baseline}: {setting.ratio:.2f}x its speed"
    return f"fastres is {setting.ratio:.2f}x as fast as {baseline}"


def _measured(settings: Sequence[Setting]) -> list[tuple[str, Row]]:
    """Ours of each comparison, or where there are none all that were timed."""
    ours = [s.ours for s in settings if s.ours is not None]
    return ours or [pair for s in settings for pair in s.timed]


def lead(settings: Sequence[Setting]) -> str:
    """What the headline compares, and every loss by name, as HTML."""
    known = [s for s in settings if s.ratio is not None]
    if not known:
        silent = ((label, row) for s in settings for label, row in s.rows if not row["ms"])
        return "; ".join(escape(f"{label}: {silence(row)}") for label, row in silent)
    if len(known) == 1:
        others = sum(not is_ours(row) and competes(row) for _, row in known[0].timed)
        said = f"Compared with the fastest of {others} others" if others > 1 else "Compared"
        return f"{said}, in alternating rounds of one run. {_losses_in_memory(known[0])}"
    losses = sorted((s for s in known if s.outcome == "slower"), key=lambda s: s.ratio or 0)
    parts = ", ".join(
        f'{escape(s.title)} <span class="bad">▼ {s.ratio:.2f}x</span>' for s in losses[:NAMED]
    )
    if len(losses) > NAMED:
        parts += f" and {len(losses) - NAMED} more"
    said = "Compared with the fastest other contender of each, in alternating rounds of one run."
    return said + (f" Slower: {parts}." if parts else " No loss beyond the noise.")


def _losses_in_memory(setting: Setting) -> str:
    ours, baseline = setting.ours, setting.baseline
    a, b = (pair[1]["peak_bytes"] if pair else None for pair in (ours, baseline))
    return html.mark(False, "It takes more memory.") if a and b and a > 1.01 * b else ""


def tiles(settings: Sequence[Setting]) -> str:
    """The figures at a glance, as HTML."""
    known = [s for s in settings if s.ratio is not None]
    figures = _one(known[0]) if len(known) == 1 else _many(known)
    rows = [row for s in settings for _, row in s.rows]
    gated = [row for row in rows if row["parity"] is not None]
    wrong = sum(map(failed, gated))
    passed = html.mark(not wrong, f"✕ {wrong} failed" if wrong else "✓ all passed")
    if gated:
        figures.append(("parity", f"{len(gated) - wrong} of {len(gated)}", passed))
    cells = "".join(
        f'<li><span class="what">{escape(what)}</span><b>{escape(value)}</b>'
        f"<span>{remark}</span></li>"
        for what, value, remark in figures
    )
    return f'<ul class="tiles">{cells}</ul>' if figures else ""


def _one(setting: Setting) -> list[tuple[str, str, str]]:
    """What, value and remark (HTML) for a result with one comparison."""
    if setting.ours is None or setting.baseline is None:
        return []
    (_, ours), (name, baseline) = setting.ours, setting.baseline
    figures = [("speed", f"{setting.ratio:.2f}x", _said(setting))]
    if ours["images_per_s"] and baseline["images_per_s"]:
        theirs = f"{escape(name)}: {figure_text(baseline['images_per_s'])}"
        figures.append(("images per second", figure_text(ours["images_per_s"]), theirs))
    for what, a, b in (
        ("peak memory", ours["peak_bytes"], baseline["peak_bytes"]),
        ("saved for backward", ours["saved_bytes"], baseline["saved_bytes"]),
    ):
        if a:
            theirs = f"<br>{escape(name)}: {memory_text(b)}"
            figures.append((what, memory_text(a), _less(a / b) + theirs if b else ""))
    if ours["share"]:
        figures.append(("of the roofline", f"{ours['share']:.0%}", "bound measured in this run"))
    return figures


def _many(known: Sequence[Setting]) -> list[tuple[str, str, str]]:
    ratios = [s.ratio for s in known if s.ratio is not None]
    if not ratios:
        return []
    best, worst = (pick(known, key=lambda s: s.ratio or 0) for pick in (max, min))
    mean = prod(ratios) ** (1 / len(ratios))
    return [
        ("on average (geometric)", f"{mean:.2f}x", f"over {len(ratios)} comparisons"),
        ("best", f"{best.ratio:.2f}x", f"{_said(best)}, {escape(best.title)}"),
        ("worst", f"{worst.ratio:.2f}x", f"{_said(worst)}, {escape(worst.title)}"),
    ]


def _said(setting: Setting) -> str:
    arrow = _ARROWS[setting.outcome or "level"]
    if setting.outcome == "level":
        return arrow
    return html.mark(setting.outcome == "faster", arrow)


def _less(ratio: float) -> str:
    """A ratio of memory in words, with its mark."""
    if abs(ratio - 1) < 0.01:
        return "● as much"
    return html.mark(ratio < 1, f"{'▼ less' if ratio < 1 else '▲ more'}, {ratio:.2f}x")
