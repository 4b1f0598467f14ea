"""The demo's result: a self-contained page, and the same figures as lines of text."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from fastres import __version__
from fastres.cli import html
from fastres.cli.demo import parity
from fastres.cli.demo.plot import Axes, Line, svg
from fastres.cli.demo.training import Contender

ACCURACY_GOAL = 0.97

#: What `plot` draws with.
STYLE = """
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.stock { stroke: var(--stock); } .fused { stroke: var(--fused); stroke-dasharray: 6 4; }
.allowed { stroke: var(--soft); stroke-dasharray: 2 3; }
"""


@dataclass
class Result:
    """What the demo found; `verdict` is None where it was interrupted before there was one."""

    stock: Contender
    fused: Contender
    verdict: parity.Verdict | None
    blocks: dict[str, Any]
    batch: int
    size: int
    seed: int
    epochs: int
    test_images: int
    enforce_accuracy: bool
    seconds: float = 0.0

    @property
    def faster(self) -> float:
        """Images per second, fused over stock."""
        return self.fused.images_per_second(self.batch) / self.stock.images_per_second(self.batch)

    def checks(self) -> list[tuple[bool, str]]:
        """Each claim of the demo: whether it holds, and the sentence that says so."""
        if self.verdict is None:
            return [(False, f"Interrupted after {len(self.fused.accuracies)} epochs.")]
        v = self.verdict
        lowest = min(self.stock.accuracies[-1], self.fused.accuracies[-1])
        found = [
            (
                v.exact_agree,
                (
                    f"In float64 the loss curves agree over {len(v.exact)} steps: at most "
                    f"{max(v.exact):.0e} apart, {v.margin:.1%} of the tolerance."
                ),
            ),
            (
                v.spread_agrees,
                (
                    f"In float32 they are {v.spread:.3g} apart on average; rounding alone "
                    f"allows {v.spread_allowed:.3g}."
                ),
            ),
            (
                v.accuracies_agree,
                (
                    f"The test accuracies are {v.accuracy_gap:.2%} apart; {v.accuracy_allowed:.2%} "
                    f"would be chance on {self.test_images} images."
                ),
            ),
        ]
        if self.enforce_accuracy:
            claim = f"Both reach {ACCURACY_GOAL:.0%} test accuracy: the lower is {lowest:.2%}."
            found.append((lowest >= ACCURACY_GOAL, claim))
        return found

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(holds for holds, _ in self.checks())


def figures(result: Result) -> list[tuple[str, str, str, str]]:
    """(what, stock, fused, fused in relation to stock) for the table."""
    stock, fused = result.stock, result.fused
    rates = [c.images_per_second(result.batch) for c in (stock, fused)]
    rows = [
        ("images per second", f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{result.faster:.2f}x"),
        (
            "saved for backward, MB per step",
            f"{stock.saved_bytes / 1e6:,.1f}",
            f"{fused.saved_bytes / 1e6:,.1f}",
            f"{fused.saved_bytes / max(stock.saved_bytes, 1):.2f}x",
        ),
        ("training loss, last step", f"{stock.losses[-1]:.4f}", f"{fused.losses[-1]:.4f}", ""),
    ]
    if stock.accuracies and fused.accuracies:
        last = (stock.accuracies[-1], fused.accuracies[-1])
        rows.append(("test accuracy", f"{last[0]:.2%}", f"{last[1]:.2%}", ""))
    return rows


def conditions(result: Result) -> str:
    """What the figures hold for, and what they do not say."""
    device = result.stock.device
    where = f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}"
    caveat = (
        " The batch was chosen large enough for fusion to show: where activations are large, stock "
        "PyTorch pays for fresh memory at each step. Smaller ones gain less; see README's table."
    )
    if device.type == "cuda":
        where, caveat = torch.cuda.get_device_name(device), ""
    return (
        f"{where}; torch {torch.__version__}, fastres {__version__}; float32, channels_last, "
        f"batch {result.batch}, images enlarged to {result.size}x{result.size}, seed "
        f"{result.seed}, {result.epochs} epochs that alternate between the two; medians over "
        f"{len(result.fused.seconds)} steps of forward, backward and update.{caveat}"
    )


def page(result: Result) -> str:
    """The whole page as HTML that refers to nothing outside itself."""
    headline = f"{result.faster:.2f}x the images per second, the same learning curve"
    if not result.passed:
        headline = "The run did not meet its claims"
    if result.verdict is None:
        headline = "Interrupted"
    sections = [
        f"<h1>{headline}</h1>",
        ("<p>A bottleneck ResNet of torchvision's own blocks learns scikit-learn's handwritten "
        "digits (1,797 scans) twice from the same seed: as it is, and after "
        "<code>fastres.convert</code>.</p>"),
        *(f'<p class="{"good" if ok else "bad"}">{escape(text)}</p>' for ok, text in
          result.checks()),
        _figures_table(result),
        f'<p class="soft">{escape(conditions(result))}</p>',
        _curves(result),
        _rounding(result.verdict) if result.verdict is not None else "",
        _blocks_table(result.blocks),
    ]  # fmt: skip
    return html.page("fastres demo", sections, STYLE)


def _figures_table(result: Result) -> str:
    rows = ([escape(cell) for cell in row] for row in figures(result))
    return html.table(("", "stock", "fused", "fused / stock"), rows)


def _curves(result: Result) -> str:
    lines = [
        Line(c.name, list(enumerate(c.losses, start=1)), c.name)
        for c in (result.stock, result.fused)
    ]
    plot = svg(Axes("Training loss of both networks", "step", "training loss"), lines)
    pairs = zip(result.stock.accuracies, result.fused.accuracies, strict=False)
    accuracies = ([str(epoch), f"{a:.2%}", f"{b:.2%}"] for epoch, (a, b) in enumerate(pairs, 1))
    return (
        f"<h2>Learning curves</h2><figure>{plot}<figcaption>Training loss, every step, same "
        "batches.</figcaption></figure>"
        + html.table(("epoch", "stock, test accuracy", "fused"), accuracies)
    )


def _rounding(verdict: parity.Verdict) -> str:
    lines = [
        Line("tolerance", list(enumerate(verdict.exact_allowed, start=1)), "allowed"),
        Line("fused from stock", list(enumerate(verdict.exact, start=1)), "fused"),
    ]
    axes = Axes("Distance of the float64 curves", "step", "distance of the loss", log=True)
    _, *paragraphs = (parity.__doc__ or "").strip().split("\n\n")
    derivation = "".join(f"<p>{escape(' '.join(text.split()))}</p>" for text in paragraphs)
    return (
        f"<h2>How far apart may the curves be?</h2>{derivation}"
        f"<figure>{svg(axes, lines)}<figcaption>Distance of the fused from the stock loss in "
        "float64, and what is allowed.</figcaption></figure>"
    )


def _blocks_table(blocks: dict[str, Any]) -> str:
    rows: Sequence[dict[str, Any]] = blocks["rows"]
    cells = (
        [
            f"<code>{escape(str(row['name']))}</code>",
            escape(str(row["type"])),
            html.mark(row["fused"], "yes" if row["fused"] else "no"),
            escape(str(row.get("reason") or row.get("level") or "")),
        ]
        for row in rows
    )
    return "<h2>What was fused</h2>" + html.table(("block", "type", "fused", "level"), cells, "")
