"""The demo: its page, its figures, and the rule by which its two curves agree."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from fastres import cli
from fastres.cli.demo import data, parity
from fastres.cli.demo.plot import Axes, Line, svg, ticks
from fastres.cli.demo.training import Contender


def needs(*packages: str) -> None:
    """Skip where one is not installed; one that is installed but broken is no excuse."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """Exit status and page of a quick run."""
    needs("sklearn", "rich", "torchvision")
    out = tmp_path_factory.mktemp("demo") / "page.html"
    status = cli.main(["demo", "--quick", "--device", "cpu", "--out", str(out)])
    return status, out.read_text(encoding="utf-8")


def test_quick_run_meets_its_claims(finished: tuple[int, str]) -> None:
    status, page = finished
    assert status == 0, re.findall(r'class="bad">([^<]*)', page)


def test_page_is_complete(finished: tuple[int, str]) -> None:
    _, page = finished
    for part in ("images per second", "saved for backward", "test accuracy", "layer1.0"):
        assert part in page, part
    assert page.count("<svg") == 2
    assert page.count('class="line stock"') >= 2


def test_page_refers_to_nothing_outside(finished: tuple[int, str]) -> None:
    _, page = finished
    assert not re.search(r"https?://|src=|url\(|@import|<link|<script", page)


def test_page_is_well_formed(finished: tuple[int, str]) -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

    balance = Balance()
    balance.feed(finished[1])
    assert balance.open == []


# ---------------------------------------------------------------- data


def test_split_is_stratified_and_reproducible() -> None:
    needs("sklearn")
    first, second, other = data.load(8, 0), data.load(8, 0), data.load(8, 1)
    assert torch.equal(first.test_x, second.test_x)
    assert not torch.equal(first.test_y, other.test_y)
    assert len(first.train_y) + len(first.test_y) == 1797
    shares = first.test_y.bincount() / (first.test_y.bincount() + first.train_y.bincount())
    # Rounding a fifth of about 180 images to a whole one moves a share by less than 1/340.
    assert (shares - data.TEST_SHARE).abs().max() < 1 / 340


def test_no_test_image_is_trained_on() -> None:
    needs("sklearn")
    digits = data.load(8, 0)
    test = {tuple(image.flatten().tolist()) for image in digits.test_x}
    train = {tuple(image.flatten().tolist()) for image in digits.train_x}
    assert len(test & train) == 0


# ---------------------------------------------------------------- the tolerance


def test_float64_curves_stay_within_what_a_nudge_did_so_far() -> None:
    stock, nudged = [2.0, 2.0, 2.0], [2.0, 2.0 + 1e-9, 2.0]
    for strays, agrees in ((0.9e-9, True), (1.1e-9, False), (math.nan, False)):
        fused = [2.0, 2.0, 2.0 + strays]
        assert verdict(*parity.judge_exact(stock, fused, nudged)).exact_agree is agrees


def test_nothing_compared_does_not_agree() -> None:
    assert not verdict([], []).exact_agree


def test_float32_curves_may_be_twice_as_far_as_a_witness() -> None:
    assert parity.distance([1.0, 2.0], [1.0, 4.0], 2) == pytest.approx(math.sqrt(2))
    assert not verdict([0.0], [1.0], spread=math.nan).spread_agrees


def verdict(exact: list[float], allowed: list[float], spread: float = 0.0) -> parity.Verdict:
    return parity.Verdict(exact, allowed, spread, 1.0, 0.0, 0.0)


def test_accuracies_may_differ_by_chance_only() -> None:
    gap, allowed = parity.accuracy_tolerance((0.99, 0.98), 360)
    assert gap == pytest.approx(0.01)
    assert allowed == pytest.approx(3 * math.sqrt(2 * 0.985 * 0.015 / 360))
    assert parity.accuracy_tolerance((1.0, 1.0), 360) == (0.0, 0.0)


@pytest.mark.parametrize("fault", ["none", "eps", "scale", "gradient"])
def test_a_fault_is_outside_the_tolerance(fault: str) -> None:
    """The rule is no formality: the smallest faults that a kernel could have are caught."""
    needs("sklearn")
    digits, steps = data.load(8, 0), 6
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
    exact = parity.Exact.of(model, 100, 0)
    norm = exact.fused.model[1]  # type: ignore[index]
    if fault == "eps":
        norm.eps *= 1 + 1e-4
    elif fault == "gradient":
        norm.weight.register_hook(lambda grad: grad * (1 + 1e-7))
    elif fault == "scale":
        norm.register_forward_hook(lambda module, inputs, out: out * (1 + 1e-8))
    for contender in exact.contenders:
        for batch in islice(data.batches(digits, 64, 0, 0), steps):
            contender.step(*batch)
    found = verdict(*parity.judge_exact(*(c.losses for c in exact.contenders)))
    assert found.exact_agree == (fault == "none")


def test_nudging_leaves_the_network_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    before = copy.deepcopy(model.state_dict())
    parity.Exact.of(model, 10, 0)
    parity.witnesses(model, 10, 0)
    assert not model[1]._forward_hooks
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# ---------------------------------------------------------------- measures and plots


def test_saved_bytes_count_each_storage_once() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
    contender = Contender("x", model, 1, memory_format=torch.contiguous_format)
    contender.measure_saved(torch.randn(8, 1, 2, 2), torch.zeros(8, dtype=torch.int64))
    images, convolved, activated, logits, labels = 32 * 4, 128 * 4, 128 * 4, 80 * 4, 8 * 8
    # ReLU saves its output, which the linear layer saves as well; the convolution's own output
    # is not needed. log_softmax saves its output; the loss saves labels and a scalar weight.
    expected = images + activated + logits + labels
    assert expected <= contender.saved_bytes <= expected + 64 < expected + convolved


def test_measuring_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
    contender = Contender("x", model, 1)
    contender.measure_saved(torch.randn(8, 1, 2, 2), torch.zeros(8, dtype=torch.int64))
    assert model[1].num_batches_tracked == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("log", [False, True])
def test_plot_skips_what_an_axis_cannot_show(log: bool) -> None:
    line = Line("a <b>", [(0, 1.0), (1, math.nan), (2, 0.0), (3, 1e-6)], "stock")
    drawn = svg(Axes("title", "x", "y", log=log), [line])
    assert "nan" not in drawn
    assert "a &lt;b&gt;" in drawn


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.0, 2.4) == pytest.approx([0, 0.5, 1.0, 1.5, 2.0])
    assert all(1 <= t <= 99 for t in ticks(1, 99))


def test_default_page_is_in_this_folder() -> None:
    from fastres.cli.demo import _parser

    assert _parser().parse_args([]).out == Path("report.html")
