"""The benchmark's report and README's tables: what they say, and that a loss is said as one."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench import readme, report, summary
from bench.comparison import settings_of
from bench.curves import points_of
from bench.results import Row, row, with_speedups
from fastres.cli import html
from fastres.cli.errors import CommandError

ROOT = Path(__file__).resolve().parent.parent
FOUND = {
    "date": "2026-01-02T03:04:05+00:00", "cpu": "Some CPU", "gpu": "Some GPU", "torch": "2.13.0",
    "commit": "abc1234", "command": "fastres bench model --model resnet50", "peak_tflop_s": 700.0,
}  # fmt: skip
VOID = {"meta", "path", "use", "br", "rect", "circle"}


def timed(contender: str, ms: float | None, spread: float = 0.01, **values: Any) -> Row:
    """A row of resnet50 in training, quartiles `spread` of the median away from it."""
    bounds = {} if ms is None else {"low": ms * (1 - spread), "high": ms * (1 + spread)}
    given = {"mode": "train", "batch": 32, "parity": "ok", "device": "cuda", **bounds, **values}
    subject = str(given.pop("subject", "resnet50"))
    return row("model", subject, contender, ms=ms, **given)


def said(*rows: Row) -> str:
    """The headline of these rows."""
    return summary.headline(settings_of(rows))


def full_result() -> dict[str, Any]:
    """A result with every part that a report can show."""
    rows = [
        timed(name, ms * batch / 32, batch=batch, bound_ms=batch / 4, peak_bytes=batch * 10**8,
              saved_bytes=batch * 8 * 10**7)
        for batch in (32, 64)
        for name, ms in (("eager", 40.0), ("compile", 30.0), ("fastres", 20.0))
    ]  # fmt: skip
    rows += [
        timed("cudnn", None, parity="failed: grad of <conv1> 3e-2 off"),
        timed("inplace_abn", None, parity=None, note="absent: not installed"),
    ]
    layers = [{"name": f"layer{i}.conv", "ms": 2.0, "bound_ms": 1.5} for i in range(14)]
    layers += [{"name": "layer0.conv", "ms": 3.0, "contender": "compile"}, {"name": "no time"}]
    curve = {
        "seconds": [float(i) for i in range(60)],
        "loss": [3.0 - i / 30 for i in range(59)] + [None],
        "accuracy": [0.2, 0.5, 0.7],
    }
    curves = {"eager": curve, "fastres": curve}
    return {**FOUND, "rows": with_speedups(rows), "layers": layers, "curves": curves}


class Page(HTMLParser):
    """What a page holds, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    made = tmp_path_factory.mktemp("report")
    assert report.write_report(full_result(), made / "new", "all") == made / "new" / "all.html"
    return made / "new"


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "all.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- what is claimed


def test_a_gain_is_over_the_fastest_of_the_others() -> None:
    rows = [timed("eager", 40.0), timed("fastres", 20.0), timed("compile", 30.0)]
    assert said(*rows) == "fastres is 1.50x as fast as compile"


def test_a_loss_is_said_as_one() -> None:
    rows = [timed("eager", 40.0), timed("compile", 15.0), timed("fastres", 20.0)]
    assert said(*rows) == "fastres is slower than compile: 0.75x its speed"
    assert "▼ slower" in summary.tiles(settings_of(rows))


@pytest.mark.parametrize(("ms", "spread"), [(20.5, 0.001), (15.0, 0.3)])
def test_what_is_within_the_noise_is_level(ms: float, spread: float) -> None:
    rows = [timed("eager", ms, spread), timed("fastres", 20.0, spread)]
    assert "as fast as eager, within the noise" in said(*rows)


def test_several_comparisons_are_counted_and_losses_named() -> None:
    rows = [
        timed(name, ms, subject=subject)
        for subject, eager in (("a", 30.0), ("b", 10.0), ("c", 20.0))
        for name, ms in (("eager", eager), ("fastres", 20.0))
    ]
    assert said(*rows) == "fastres is faster in 1 of 3 comparisons, level in 1, slower in 1"
    assert 'Slower: b <span class="bad">▼ 0.50x</span>.' in summary.lead(settings_of(rows))


def test_more_memory_is_said_beside_a_gain() -> None:
    rows = [timed("eager", 40.0, peak_bytes=10**9), timed("fastres", 20.0, peak_bytes=2 * 10**9)]
    assert "more memory" in summary.lead(settings_of(rows))
    assert '<span class="bad">▲ more, 2.00x</span>' in summary.tiles(settings_of(rows))


def test_a_bound_competes_with_nobody() -> None:
    rows = [timed("eager", 40.0), timed("convolutions", 10.0), timed("fastres", 20.0)]
    assert said(*rows) == "fastres is 2.00x as fast as eager"


def test_kernels_are_held_to_a_copy_and_not_to_the_formula_that_defines_them() -> None:
    assert said(*kernels_result()["rows"]) == "Median share of the roofline: 38% (4 timed)"


def test_failed_parity_has_no_speed() -> None:
    rows = [timed("eager", 40.0), timed("fastres", None, parity="failed: 1e-2 off")]
    assert said(*rows) == "fastres failed the parity gate, so it has no speed"


def test_nothing_to_compare_with_is_no_claim() -> None:
    assert "Nothing here to compare" in said(timed("fastres", 20.0))
    assert said(timed("copy", 20.0, bound_ms=10.0)) == "Median share of the roofline: 50% (1 timed)"
    assert "Nothing here" in said()


def test_a_batch_that_memory_halved_stays_in_its_comparison() -> None:
    (setting,) = settings_of([timed("eager", 40.0, batch=16), timed("fastres", 40.0, batch=32)])
    assert setting.ratio == pytest.approx(2.0)


def test_batches_that_all_ran_are_comparisons_of_their_own() -> None:
    rows = [timed(name, 20.0, batch=batch) for batch in (8, 16) for name in ("eager", "fastres")]
    assert [s.title for s in settings_of(rows)] == ["resnet50, batch 8", "resnet50, batch 16"]


def test_twins_are_told_apart() -> None:
    (setting,) = settings_of([timed("fastres", 20.0, level="b"), timed("fastres", 19.0, level="c")])
    assert [label for label, _ in setting.rows] == ["fastres b", "fastres c"]


# ---------------------------------------------------------------- the page


def test_the_page_is_complete(text: str, folder: Path) -> None:
    for part in (
        "fastres is faster in 2 of 2 comparisons", "Some GPU", "abc1234",
        "<code>fastres bench model --model resnet50</code>", "✓ ok", "▲ 2.00x",
        "✕ failed: grad of &lt;conv1&gt; 3e-2 off", "absent: not installed",
        "GB (shorter is better)",
    ):  # fmt: skip
        assert part in text, part
    names = "layers curves memory memory-by-batch ratios speed speed-by-batch"
    for name in names.split():
        assert (folder / f"all-{name}.png").read_bytes()[:4] == b"\x89PNG", name
    assert text.count("<svg") == 2 * len(names.split())
    assert sorted(p.suffix for p in folder.iterdir()) == [".html"] + [".png"] * 7


def test_the_page_is_well_formed_and_refers_to_nothing_outside(text: str) -> None:
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.endswith(("src", "href")) or value.startswith("#"), (tag, name, value)
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_figures_take_their_colours_from_the_page(text: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", text))
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    for variable in used:
        assert len(re.findall(rf"--{variable}:", style[1])) >= 2, f"{variable}: light and dark"


def test_the_same_result_gives_the_same_page(text: str) -> None:
    assert report.page(full_result(), report.Figures(full_result()).sections) == text


def test_a_result_of_nothing_but_failures_has_a_page(tmp_path: Path) -> None:
    rows = [timed("fastres", None, parity="failed: <nan>"), timed("eager", None, note="a & b")]
    path = report.write_report({**FOUND, "rows": rows}, tmp_path)
    assert path.name == "2026-01-02T030405-some-gpu-model-resnet50.html"
    page = path.read_text(encoding="utf-8")
    assert not Page(page).open
    assert "a &amp; b" in page
    assert "&lt;nan&gt;" in page
    assert "<nan>" not in page


def test_without_matplotlib_the_page_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    page = report.write_report(full_result(), tmp_path, "bare").read_text(encoding="utf-8")
    assert "pip install matplotlib" in page
    assert [p.name for p in tmp_path.iterdir()] == ["bare.html"]


def test_a_report_is_drawn_again_over_the_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**FOUND, "rows": [timed("fastres", 20.0), timed("eager", 40.0)]}))
    (tmp_path / "x.html").write_text("old")
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "x.html")
    assert "2.00x as fast as eager" in (tmp_path / "x.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"rows": [{}]}'])
def test_what_is_no_result_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CommandError, match="path must be"):
        report.main([str(path)])
    assert not (tmp_path / "x.html").exists()


def test_curves_leave_out_what_overflowed_and_place_epochs_at_their_ends() -> None:
    curve = {"seconds": [1.0, 2.0, 3.0, 4.0], "loss": [9.0, None, 7.0, 6.0], "accuracy": [0.5, 0.6]}
    assert points_of(curve, "loss", "steps") == [(1, 9.0), (3, 7.0), (4, 6.0)]
    assert points_of(curve, "loss", "seconds") == [(1.0, 9.0), (3.0, 7.0), (4.0, 6.0)]
    assert points_of(curve, "accuracy", "seconds") == [(2.0, 0.5), (4.0, 0.6)]
    assert points_of(curve, "accuracy", "steps") == [(2, 0.5), (4, 0.6)]
    assert points_of({"loss": [1.0]}, "loss", "seconds") == []


def test_tables_scroll_in_their_own_box() -> None:
    assert html.table(["a"], [["1"]]).startswith('<div class="scroll"')


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_marks_stand_out(dark: bool) -> None:
    # WCAG 2.2: 4.5 to 1 for text, 3 to 1 for the parts of a figure that carry meaning.
    style = html.STYLE + report.plot.STYLE
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    chosen = "".join(b for i, b in enumerate(blocks) if (i % 2 == 1) == dark)
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+)", chosen))
    for name in ("ink", "soft", "good", "bad"):
        for behind in ("paper", "raised"):
            assert contrast(colours[name], colours[behind]) >= 4.5, (name, behind)
    for name in ("fused", "other", *(f"series-{i}" for i in range(7))):
        assert contrast(colours[name], colours["paper"]) >= 3.0, name


def contrast(a: str, b: str) -> float:
    """WCAG's ratio of two colours' luminances."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else math.pow((p + 0.055) / 1.055, 2.4) for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# ---------------------------------------------------------------- README


def test_readme_is_what_its_result_files_give() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.SECTION.search(text)
    assert text.count("bench:begin") == len(readme.SECTION.findall(text))
    assert readme.rendered(text, ROOT) == text, "python -m bench readme"


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of a README and two results."""
    (tmp_path / "old.json").write_text(json.dumps(blocks_result()))
    (tmp_path / "new.json").write_text(json.dumps(full_result()))
    sections = "<!-- bench:begin {} -->\nstale\n<!-- bench:end -->"
    parts = ["# Title", *(sections.format(s) for s in ("block old.json", "model new.json")), "End"]
    (tmp_path / "README.md").write_text("\n\n".join(parts))
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(readme, "ROOT", tmp_path / "bench")
    return tmp_path


def blocks_result() -> dict[str, Any]:
    """Two blocks, one of them also with malloc keeping freed memory, where it loses."""
    rows = [
        {**timed(name, ms, subject=subject, allocator=allocator), "kind": "block"}
        for subject, allocator, times in (
            ("64-64, 56x56", None, (30.0, 20.0, 10.0)),
            ("64-64, 56x56", "kept", (11.0, 9.0, 10.0)),
            ("512-128, 7x7", None, (30.0, 20.0, None)),
            ("2048-512, 7x7", None, (30.0, 20.0, None)),
        )
        for name, ms in zip(("eager", "compile", "fastres"), times, strict=True)
    ]
    rows[-1]["parity"] = "failed: it is off"
    return {**FOUND, "rows": rows}


def test_readme_is_rewritten_and_checked(top: Path) -> None:
    assert readme.main(["--check"]) == 1
    assert "stale" in (top / "README.md").read_text(encoding="utf-8")
    assert readme.main([]) == 0
    text = (top / "README.md").read_text(encoding="utf-8")
    assert "stale" not in text
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nEnd")
    assert "| block | train | train, freed memory kept |" in text
    line = "| 64-64, 56x56 | ▲ 2.00x, 10 ms (compile) | ▼ 0.90x, 10 ms (compile) |"
    assert line in text and "| 512-128, 7x7 | - | - |" in text
    assert "| 2048-512, 7x7 | ✗ parity | - |" in text
    assert "**fastres is faster in 2 of 2 comparisons.**" in text
    assert "| ms | eager | compile | fastres |" in text
    assert "| resnet50, batch 64 | 80 | 60 | 40 | - | - | 2.00x | ▲ 1.50x compile |" in text
    assert readme.main(["--check"]) == 0


def test_readme_shows_all_figures_of_a_single_comparison() -> None:
    figures = {"peak_bytes": 32 * 10**8, "saved_bytes": 26 * 10**8, "bound_ms": 8.0}
    rows = [timed("eager", 15.0, **figures), timed("fastres", 20.0, **figures),
            timed("cudnn", None, parity="failed: 1 | 2")]  # fmt: skip
    table = readme.TABLES["model"]({**FOUND, "rows": with_speedups(rows)})
    assert table[0].startswith("**fastres is slower than eager: 0.75x its speed.** Some GPU, ")
    assert "| fastres | 1,600 | 20 | 19.8 to 20.2 | 0.75x | 3.2 GB | 2.6 GB | 40% | ✓ |" in table
    assert table[-1].endswith("| ✗ failed: 1 \\| 2 |")


def kernels_result() -> dict[str, Any]:
    """Two variants of a kernel, and one whose tensors are too small to say anything."""
    rows = [
        row("kernel", f"{primitive}, {variant}, 16x64x7x7", name, ms=ms, bound_ms=1.0, bytes=moved)
        for primitive, moved in (("add_act", 2_000_000), ("finalize_stats", 1000))
        for variant, ours in (("plain", 2.0), ("mask", 4.0))
        for name, ms in (("aten:formula", 8.0), ("cpu:fused", ours))
    ]
    return {**FOUND, "rows": rows}


def test_readme_shows_kernels_by_shape() -> None:
    assert readme.TABLES["kernel"](kernels_result())[-3:] == [
        "| kernel | 16x64x7x7 |", "|---|---|", "| `add_act` | 38% |",
    ]  # fmt: skip


def test_kernels_have_a_figure_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert [d.name for d in report.drawings_of(kernels_result())] == ["shares", "speed"]
    text = report.write_report(kernels_result(), tmp_path, "kernels").read_text(encoding="utf-8")
    assert "Kernels beside a copy" in text and ">38%<" in text
    assert not [d for d in report.drawings_of(full_result()) if d.name == "shares"]


def test_readme_can_name_another_result(top: Path) -> None:
    (top / "newer.json").write_text(json.dumps({**full_result(), "commit": "fff0000"}))
    assert readme.main(["--use", str(top / "newer.json")]) == 0
    text = (top / "README.md").read_text(encoding="utf-8")
    assert "<!-- bench:begin model newer.json -->" in text
    assert "fff0000" in text
    assert "<!-- bench:begin block old.json -->" in text


def test_readme_refuses_what_it_cannot_show(top: Path, tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "new.json"
    elsewhere.write_text((top / "new.json").read_text())
    with pytest.raises(CommandError, match="--use must name a file below"):
        readme.main(["--use", str(elsewhere)])
    readme.README.write_text("<!-- bench:begin toast new.json -->\n<!-- bench:end -->")
    with pytest.raises(CommandError, match="bench:begin must name one of"):
        readme.main([])
    with pytest.raises(CommandError, match="must have a table of model"):
        readme.main(["--use", str(top / "new.json")])
    readme.README.write_text("<!-- bench:begin model gone.json -->\n<!-- bench:end -->")
    with pytest.raises(CommandError, match="must be a file that can be read"):
        readme.main([])
