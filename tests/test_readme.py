"""Every snippet of the README runs, and every command in it is run by a test or is a make verb."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastres.cli.environment import markdown

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: Commands that are run elsewhere: by whom.
ELSEWHERE = {
    "make demo": "tests/test_demo.py runs what it runs after the set-up",
    "make test": "this run",
    "pip install .": "tests/test_packaging.py builds and installs the wheel",
    "fastres demo": "tests/test_demo.py",
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    lines = [
        line.partition("#")[0].strip() for block in _blocks("sh") for line in block.split("\n")
    ]
    return [line for line in lines if line]


@pytest.mark.parametrize("snippet", _blocks("python"))
def test_snippet_runs(snippet: str) -> None:
    # A fresh process: snippets register hooks and must hold on their own.
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", snippet],
        check=False, capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in _commands() if c not in ELSEWHERE])
def test_command_runs(command: str) -> None:
    program, *arguments = command.split()
    assert program == "fastres", f"say in ELSEWHERE who runs {command!r}"
    done = subprocess.run(
        [sys.executable, "-m", "fastres.cli", *arguments],
        check=False, capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_no_stale_exception() -> None:
    assert set(ELSEWHERE) <= set(_commands())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("verb", ["help", "demo", "test", "lint", "bench", "clean"])
def test_make_knows_the_verb(verb: str) -> None:
    done = subprocess.run(
        ["make", "-n", verb], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_map_names_what_is_there() -> None:
    the_map = README[README.index("## The map") :]
    rows = re.findall(r"^\| (`[^|]+`) \|", the_map, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


def test_environment_table_is_the_one_in_the_code() -> None:
    assert markdown() in (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
