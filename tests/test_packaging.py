"""The wheel: what is in it, that it runs elsewhere, and what happens without a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: What a build may need from the source tree; a copy keeps its leftovers out of the checkout.
SOURCES = (
    "csrc",
    "fastres",
    "triton_kernels",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)


def _wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    tree = folder / "tree"
    tree.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "--", *SOURCES], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", str(folder)]
    return subprocess.run(
        [*command, str(tree)], capture_output=True, text=True, env={**os.environ, **environment},
        check=False, timeout=560,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a user's pip builds it: isolated, with no torch in the build environment."""
    folder = tmp_path_factory.mktemp("wheel")
    done = _wheel(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = folder.glob("*.whl")
    return found


def test_only_top_level_name_is_fastres(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastres"}
    assert "fastres/triton_kernels/add_act.py" in names
    assert "fastres/py.typed" in names
    assert any(name.startswith("fastres/_cpu.") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_runs_away_from_the_source(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, timeout=120)
    code = (
        "import sys, fastres, fastres.triton_kernels as t; from fastres.cli import main;"
        "assert 'site' in fastres.__file__ and 'site' in t.__file__, fastres.__file__;"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(site)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cpu" in json.dumps(json.loads(done.stdout))


def test_no_compiler_costs_the_module_not_the_install(tmp_path: Path) -> None:
    done = _wheel(tmp_path, CXX="no-such-compiler", FASTRES_CPU="auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fastres._cpu was not built" in done.stdout + done.stderr
    (found,) = tmp_path.glob("*.whl")
    assert not [n for n in zipfile.ZipFile(found).namelist() if "_cpu." in n]


def test_a_compiler_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    done = _wheel(tmp_path, CXX="no-such-compiler", FASTRES_CPU="1")
    assert done.returncode != 0
    assert "no-such-compiler" in done.stdout + done.stderr
