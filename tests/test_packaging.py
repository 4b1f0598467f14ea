"""The wheel: what is in it, that it runs elsewhere, and what happens without a compiler.

The CUDA kernels are built once, for one architecture, and only where there is an nvcc; elsewhere
nothing but their absence can be tested.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: What a build may need from the source tree; a copy keeps its leftovers out of the checkout.
SOURCES = (
    "bench",
    "csrc",
    "fastres",
    "triton_kernels",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)


NVCC = any(
    shutil.which("nvcc", path=path) for path in (os.environ.get("PATH"), "/usr/local/cuda/bin")
)
needs_nvcc = pytest.mark.skipif(not NVCC, reason="there is no nvcc")


def _tree(folder: Path) -> Path:
    tree = folder / "tree"
    tree.mkdir()
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *SOURCES]
    done = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True)
    # One that is deleted stays listed until that is committed.
    for name in filter(lambda name: (ROOT / name).exists(), done.stdout.split()):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


def _wheel(
    folder: Path, tree: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    tree = tree or _tree(folder)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", str(folder)]
    return subprocess.run(
        [*command, str(tree)], capture_output=True, text=True, env={**os.environ, **environment},
        check=False, timeout=560,
    )  # fmt: skip


def _names(folder: Path) -> list[str]:
    (found,) = folder.glob("*.whl")
    return zipfile.ZipFile(found).namelist()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a user's pip builds it: isolated, with no torch in the build environment."""
    folder = tmp_path_factory.mktemp("wheel")
    cuda = {"FASTRES_CUDA": "1", "FASTRES_CUDA_ARCHS": "90a"} if NVCC else {"FASTRES_CUDA": "0"}
    done = _wheel(folder, NVCC_APPEND_FLAGS="-Werror all-warnings", **cuda)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = folder.glob("*.whl")
    return found


def test_only_top_level_name_is_fastres(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastres"}
    assert "fastres/triton_kernels/add_act.py" in names
    assert "fastres/bench/command.py" in names
    assert not any(name.startswith("fastres/bench/results/") for name in names)
    assert "fastres/py.typed" in names
    assert any(name.startswith("fastres/_cpu.") for name in names)
    assert any(name.startswith("fastres/_cuda.") for name in names) == NVCC
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_runs_away_from_the_source(wheel: Path, tmp_path: Path) -> None:
    """On this machine, which may have neither a GPU nor its driver."""
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
    facts = json.loads(done.stdout)
    present = {module["name"]: module["present"] for module in facts["modules"]}
    assert present == {"fastres._cpu": True, "fastres._cuda": NVCC}
    assert facts["cuda"]["archs"] == ("90a" if NVCC else None)


def test_no_compiler_costs_the_module_not_the_install(tmp_path: Path) -> None:
    done = _wheel(tmp_path, CXX="no-such-compiler", FASTRES_CPU="auto", FASTRES_CUDA="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fastres._cpu was not built" in done.stdout + done.stderr
    assert "fastres._cuda was not built" not in done.stdout + done.stderr
    assert not [n for n in _names(tmp_path) if n.startswith("fastres/_c")]


def test_no_nvcc_costs_the_module_not_the_install(tmp_path: Path) -> None:
    done = _wheel(tmp_path, CUDA_HOME=str(tmp_path), FASTRES_CPU="0", FASTRES_CUDA="auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "fastres._cuda was not built: CUDA_HOME must be a folder with bin/nvcc, got"
        in done.stdout + done.stderr
    )
    assert not [n for n in _names(tmp_path) if n.startswith("fastres/_c")]


def _refused(folder: Path, tree: Path | None = None, **environment: str) -> str:
    """What a build says that fails, which is no traceback."""
    done = _wheel(folder, tree, **{"FASTRES_CPU": "0", "FASTRES_CUDA": "1", **environment})
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert "Traceback" not in said
    return said


def test_a_compiler_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    said = _refused(tmp_path, CXX="no-such-compiler", FASTRES_CPU="1", FASTRES_CUDA="0")
    assert "CXX must name a C++ compiler, got 'no-such-compiler'" in said


def test_an_nvcc_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    said = _refused(tmp_path, CUDA_HOME=str(tmp_path))
    assert "error: fastres._cuda was not built: CUDA_HOME must be a folder with bin/nvcc" in said


def test_a_switch_has_three_positions(tmp_path: Path) -> None:
    assert "FASTRES_CUDA must be 0, 1 or auto, got 'yes'" in _refused(tmp_path, FASTRES_CUDA="yes")


@pytest.mark.skipif(sys.platform != "linux", reason="no CUDA kernels elsewhere")
@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("V11.8.89", ["nvcc must be of CUDA 12.0 or newer, for C++20, got V11.8.89 of"]),
        ("V12.4.131", ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"]),
    ],
)
def test_an_older_nvcc_builds_what_it_knows(version: str, said: list[str], tmp_path: Path) -> None:
    """A stand-in that answers questions and compiles nothing; ninja then shows its command."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        f"case $* in --version) echo {version};; --list-gpu-code) echo sm_70 sm_80 sm_90;; "
        "--dryrun*) ;; *) exit 1;; esac\n"
    )
    nvcc.chmod(0o755)
    found = _refused(tmp_path, CUDA_HOME=str(tmp_path), FASTRES_CUDA_ARCHS="")
    assert all(part in found for part in said)
    assert "compute_100" not in found


@needs_nvcc
@pytest.mark.parametrize("archs", ["hopper", "80;12345"])
def test_architectures_must_be_ones_that_nvcc_knows(archs: str, tmp_path: Path) -> None:
    """A slip there never costs the module silently."""
    said = _refused(tmp_path, FASTRES_CUDA="auto", FASTRES_CUDA_ARCHS=archs)
    assert "FASTRES_CUDA_ARCHS must list GPU architectures, as in '80;90a;100+PTX'" in said
    assert f"got '{archs}'" in said


@needs_nvcc
def test_a_kernel_that_does_not_compile_is_one_sentence(tmp_path: Path) -> None:
    tree = _tree(tmp_path)
    for source in (tree / "csrc" / "cuda").glob("*.cu"):
        source.write_text("#error on purpose\n")
    said = _refused(tmp_path, tree, FASTRES_CUDA_ARCHS="90a")
    assert "on purpose" in said
    assert "error: fastres._cuda was not built: a compiler failed, and says why above." in said
