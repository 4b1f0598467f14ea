"""`make gpu-check` without a GPU: all its stages on tiny sizes, its limits, its errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import gpu_check
from bench.gpu_check import Command


def test_dry_run_goes_through_all_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = gpu_check.main(["--dry", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert status == 0, shown
    for stage in gpu_check.STAGES:
        assert f"{stage}: passed" in shown
        assert list(tmp_path.glob(f"*-{stage}.log"))


def test_what_takes_too_long_is_stopped_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = f"{sys.executable} -c 'import time; print(1, flush=True); time.sleep(60)'"
    stages = {
        "endless": lambda dry: [Command(endless, 1)],
        "wrong": lambda dry: [Command("exit 3", 1)],
        "right": lambda dry: [Command("true", 1)],
    }
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.5)  # where SIGINT is ignored
    assert gpu_check.main(["--dry", "--seconds", "6", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "endless: stopped after 2 s" in shown
    assert "wrong: failed (3)" in shown
    assert "right: passed" in shown


@pytest.mark.parametrize("stage", ["nonsense", "build|nonsense"])
def test_unknown_stage(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_check.main(["--dry", "--stage", stage])
    assert error.value.code == 2
    assert "stage must be one of build, parity" in capsys.readouterr().err
