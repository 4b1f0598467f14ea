"""Results of the benchmark: rows, files that are whole or not there, the table, comparison."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import compare, results
from bench.results import Row, row
from fastres.cli.errors import CommandError

FOUND = {"date": "2026-01-02T03:04:05+00:00", "cpu": "Some CPU (R) 2.0"}


def timed(contender: str, ms: float | None, spread: float = 0.01, **values: Any) -> Row:
    """A row of resnet50 in training, quartiles `spread` of the median away from it."""
    bounds = {} if ms is None else {"low": ms * (1 - spread), "high": ms * (1 + spread)}
    given = {"mode": "train", "batch": 32, "parity": "ok", **bounds, **values}
    return row("model", "resnet50", contender, ms=ms, **given)


def printed(renderable: object, width: int = 100) -> str:
    """What a terminal shows."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_a_row_has_every_key_and_works_out_rate_and_share() -> None:
    made = row("model", "resnet50", "eager", ms=50.0, batch=16, bound_ms=20.0)
    assert tuple(made) == results.COLUMNS
    assert made["images_per_s"] == pytest.approx(320.0)
    assert made["share"] == pytest.approx(0.4)
    assert made["low"] is None
    with pytest.raises(TypeError, match=r"values must be among .*got speed"):
        row("model", "resnet50", "eager", speed=1)


def test_a_row_without_time_has_no_rate() -> None:
    made = row("model", "resnet50", "eager", batch=16, bound_ms=20.0, parity="failed: off")
    assert made["images_per_s"] is None
    assert made["share"] is None


def test_speedup_is_over_eager_of_the_same_setting() -> None:
    rows = [
        timed("fastres", 50.0), timed("eager", 100.0), timed("cudnn", None),
        timed("fastres", 30.0, mode="infer"), timed("eager", 15.0, mode="infer"),
        timed("fastres", 80.0, batch=64), timed("eager", 200.0, batch=64),
    ]  # fmt: skip
    found = [one["speedup"] for one in results.with_speedups(rows)]
    assert found == [2.0, 1.0, None, 0.5, 1.0, 2.5, 1.0]


def test_speedup_without_eager_is_over_the_first_and_with_another_batch_per_image() -> None:
    rows = [timed("fastres", 50.0, batch=64), timed("cudnn", 100.0, batch=64)]
    assert [one["speedup"] for one in results.with_speedups(rows)] == [1.0, 0.5]
    rows = [timed("fastres", 50.0, batch=64), timed("eager", 50.0, batch=32)]
    assert [one["speedup"] for one in results.with_speedups(rows)] == [2.0, 1.0]


def test_name_of_a_result() -> None:
    name = results.name_of(FOUND, "model", "timm:resnet50d")
    assert name == "2026-01-02T030405-some-cpu-r-2-0-model-timm-resnet50d"
    assert "nvidia-h200" in results.name_of({**FOUND, "gpu": "NVIDIA H200"}, "block", "all")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [timed("eager", 100.0, note='a, "note"'), timed("fastres", 50.0)]
    curves = {"eager": {"seconds": [1.0], "loss": [float("nan")], "accuracy": [0.5]}}
    path = results.write({**FOUND, "rows": rows, "curves": curves}, tmp_path / "new" / "one", "r")
    assert path == tmp_path / "new" / "one" / "r.json"
    read = results.read(path)
    assert read["rows"] == rows
    assert read["curves"]["eager"]["loss"] == [None]
    with path.with_suffix(".csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert tuple(cells[0]) == results.COLUMNS
    assert [(c["contender"], float(c["ms"]), c["level"]) for c in cells] == [
        ("eager", 100.0, ""), ("fastres", 50.0, ""),
    ]  # fmt: skip
    assert cells[0]["note"] == 'a, "note"'
    assert sorted(p.name for p in path.parent.iterdir()) == ["r.csv", "r.json"]


def test_results_are_never_written_over(tmp_path: Path) -> None:
    paths = [results.write({"rows": [timed("eager", ms)]}, tmp_path, "r") for ms in (1.0, 2.0)]
    (tmp_path / "r-3.csv").write_text("somebody's own")
    (tmp_path / "r-4.json").write_text("somebody's own")
    paths.append(results.write({"rows": [timed("eager", 3.0)]}, tmp_path, "r"))
    assert [p.name for p in paths] == ["r.json", "r-2.json", "r-5.json"]
    assert not (tmp_path / "r-4.csv").exists()
    assert [results.read(p)["rows"][0]["ms"] for p in paths] == [1.0, 2.0, 3.0]
    assert (tmp_path / "r-3.csv").read_text() == "somebody's own"


def test_a_csv_that_the_user_named_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "rows.csv"
    results.write_csv([timed("eager", 1.0), timed("fastres", 1.0)], path)
    results.write_csv([timed("eager", 2.0)], path)
    assert len(path.read_text().splitlines()) == 2
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]
    with pytest.raises(OSError, match=r"path must be a file that can be written, got .*sub"):
        results.write_csv([], path.parent)
    assert [p.name for p in tmp_path.iterdir()] == ["sub"]


def test_nothing_is_left_where_a_result_cannot_be_said_in_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        results.write({"rows": [], "dtype": object()}, tmp_path, "r")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["link", "chmod"])
def test_nothing_is_left_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=r"path must be .*got .*r\.csv: No space left on device"):
        results.write({"rows": []}, tmp_path, "r")
    assert not list(tmp_path.iterdir())


def test_a_result_of_which_one_half_fails_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def fail(source: str, target: Path) -> None:
        if target.suffix == ".json":
            raise OSError(28, "No space left on device")
        link(source, target)

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="No space"):
        results.write({"rows": []}, tmp_path, "r")
    assert not list(tmp_path.iterdir())


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    paths = [results.write({"rows": [timed("eager", ms)]}, tmp_path, "r") for ms in (1.0, 2.0)]
    assert [results.read(p)["rows"][0]["ms"] for p in paths] == [1.0, 2.0]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"folder must be .* written to, got .*: \w+") as caught:
            results.ready(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="folder must be"):
        results.write({"rows": []}, tmp_path / "file", "r")
    for name in ("", "a/b", ".."):
        with pytest.raises(ValueError, match="name must be a file's name"):
            results.write({"rows": []}, tmp_path, name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"folder must be .*Permission denied"):
        results.ready(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes, as the system enforces it, in the middle of writing."""
    code = (
        "import resource, signal, sys; from bench import results\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: results.write({'rows': [], 'text': 'x' * 100_000}, sys.argv[1], 'r')\n"
        "except OSError as error: print(error)"
    )
    pytest.importorskip("resource")
    command = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert "path must be a file that can be written" in done.stdout
    assert "File too large" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not JSON"),
        ("{", "it is not JSON"),
        ("[]", "it has no rows"),
        ('{"blocks": []}', "it has no rows"),
        ('{"rows": [{"primitive": "add_act"}]}', "a row has no kind, subject, contender"),
        ('{"rows": [1]}', "a row has no kind"),
    ],
)
def test_a_file_that_is_none_of_ours(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"path must be a result.*r\.json: {why}"):
        results.read(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"path must be a file.*No such file"):
        results.read(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is not JSON"):
        results.read(tmp_path / "binary.json")


def test_a_row_of_an_older_version_is_filled_up(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    old = {"kind": "model", "subject": "a", "contender": "eager", "ms": 1.0, "later": 2}
    path.write_text(json.dumps({"rows": [old]}))
    (read,) = results.read(path)["rows"]
    assert read["ms"] == 1.0 and read["level"] is None and read["later"] == 2


def test_the_table_shows_wins_losses_failures_and_what_is_absent() -> None:
    rows = results.with_speedups(
        [
            timed("eager", 1234.5, peak_bytes=2_500_000_000, bound_ms=617.25),
            timed("fastres", 2469.0, saved_bytes=12_300_000),
            timed("compile", None, parity="failed: [x] off by 3"),
            timed("cudnn", None, parity=None, note="absent: no GPU"),
        ]
    )
    text = printed(results.table(rows, "Models"))
    for part in ("Models", "resnet50, train", "1,234.50 ± 12.35", "2.5 GB", "50%", "0.50x", "✓"):
        assert part in text
    for part in ("12.3 MB", "✗", "compile: parity failed: [x] off by 3", "cudnn: absent: no GPU"):
        assert part in text


def test_the_table_leaves_out_columns_that_nobody_fills() -> None:
    text = printed(results.table([timed("eager", 0.01234, spread=0.1)]))
    assert "0.0123 ± 0.0012" in text
    assert "peak" not in text and "roofline" not in text and "speedup" not in text
    assert printed(results.table([]))


def test_a_narrow_terminal_loses_no_digit() -> None:
    rows = results.with_speedups(
        [timed("eager", 1234.5, allocator="kept", peak_bytes=10**9, bound_ms=1.0)]
    )
    wide, narrow = (printed(results.table(rows), width=width) for width in (120, 70))
    assert "…" not in narrow and "✓" in narrow
    assert sorted(filter(str.isdigit, narrow)) == sorted(filter(str.isdigit, wide))


# ---------------------------------------------------------------- comparison


def outcomes(before: list[Row], after: list[Row]) -> dict[str, str]:
    """Contender -> outcome."""
    return {c.row["contender"]: c.outcome for c in compare.compare(before, after)}


def test_what_moved_beyond_noise() -> None:
    before = [
        timed("faster", 100.0), timed("slower", 100.0), timed("near", 100.0, spread=0.001),
        timed("noisy", 100.0, spread=0.2), timed("gone", 1.0),
    ]  # fmt: skip
    after = [
        timed("faster", 90.0), timed("slower", 110.0), timed("near", 102.9, spread=0.001),
        timed("noisy", 120.0, spread=0.2), timed("new", 1.0),
    ]  # fmt: skip
    assert outcomes(before, after) == {
        "faster": "faster", "slower": "slower", "near": "same", "noisy": "same",
        "gone": "missing", "new": "new",
    }  # fmt: skip


def test_rows_of_other_settings_are_other_rows() -> None:
    before = [timed("eager", 1.0, level="b"), timed("eager", 9.0, level="c")]
    after = [timed("eager", 9.0, level="c"), timed("eager", 1.0, level="b", batch=64)]
    assert sorted(c.outcome for c in compare.compare(before, after)) == ["missing", "new", "same"]
    twice = [timed("eager", 1.0), timed("eager", 5.0)]
    assert [c.outcome for c in compare.compare(twice, twice)] == ["same", "same"]


def test_parity_and_memory_move_too() -> None:
    before = [timed("a", 1.0), timed("b", 1.0, peak_bytes=100), timed("c", 1.0)]
    after = [
        timed("a", None, parity="failed: off"), timed("b", 1.0, peak_bytes=90),
        timed("c", None, parity=None),
    ]  # fmt: skip
    found = {c.row["contender"]: (c.what, c.outcome) for c in compare.compare(before, after)}
    assert found["a"] == ("parity", "parity lost")
    assert found["b"] == ("peak_bytes", "less")
    found_back = {c.row["contender"]: c.outcome for c in compare.compare(after, before)}
    assert found_back == {"a": "parity won", "b": "more", "c": "new"}


def test_a_contender_that_is_absent_now_is_missing() -> None:
    absent = timed("compile", None, parity=None, note="absent: no compiler")
    change = compare.compare([timed("compile", 1.0, parity=None)], [absent])
    assert [c.outcome for c in change] == ["missing"]
    assert [c.outcome for c in compare.compare([absent], [absent])] == ["same"]


def test_compare_prints_both_directions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [timed("eager", 100.0), timed("fastres", 100.0), timed("compile", 7.0)]
    after = [timed("eager", 50.0), timed("fastres", 200.0), timed("compile", 7.0)]
    paths = [
        results.write({**FOUND, "torch": torch, "rows": rows}, tmp_path, "r")
        for torch, rows in (("2.12", before), ("2.13", after))
    ]
    assert compare.main([str(p) for p in paths]) == 0
    said = capsys.readouterr().out
    for part in ("torch: 2.12 -> 2.13", "0.500", "2.000", "1 faster, 1 slower, 1 same"):
        assert part in said
    assert "compile" not in said


def test_compare_refuses_what_is_no_result(tmp_path: Path) -> None:
    good = results.write({**FOUND, "rows": []}, tmp_path, "r")
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(CommandError, match=r"bad\.json: it has no rows"):
        compare.main([str(good), str(bad)])
    with pytest.raises(CommandError, match="No such file"):
        compare.main([str(tmp_path / "none.json"), str(good)])
