"""Builds the CUDA kernels for the CPU, against the emulation, and loads or runs them.

From the command line, where the kernels are to be run under AddressSanitizer and UBSan (its
runtimes must come first into a process)::

    env $(python tests/cuda_emulation/build.py --environment) python -m pytest tests/cuda_backend

Everything built stands in a cache outside the checkout, and is built anew where a source changed.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"fastres-cuda-emulation-{getpass.getuser()}"
KEPT_SECONDS = 24 * 3600
#: The path of the module to load, where a command line chose one.
CHOICE = "FASTRES_CUDA_EMULATION_MODULE"

COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-pthread", "-ffp-contract=off"]
# Vector accesses are what they are on a GPU; g++ may not conclude anything from their types.
FLAGS += ["-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-DFASTRES_CUDA_EMULATION"]
# What is looked up at every turn of a thread: without a call that AddressSanitizer wraps.
FLAGS += ["-ftls-model=initial-exec"]
FLAGS += [f"-I{CSRC}", f"-I{CSRC / 'include'}", f"-I{HERE}"]
_NO_RECOVERY = "-fno-sanitize-recover=all"
SANITIZERS = {
    "none": [],
    "address": ["-fsanitize=address,undefined", _NO_RECOVERY],
    "thread": ["-fsanitize=thread"],
}
RUNTIMES = {
    "none": [],
    # The last one holds what an exception is thrown by, which AddressSanitizer wraps as it starts.
    "address": ["libasan.so", "libubsan.so", "libstdc++.so.6"],
}


def kernels() -> list[Path]:
    """The sources of the CUDA kernels."""
    return sorted((CSRC / "cuda").glob("*.cu"))


def build_module(sanitizer: str = "address") -> Path:
    """The path of the Python module ``_cuda``; ``sanitizer`` is "address" or "none"."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    told = ['-DFASTRES_CUDA_ARCHS="emulation"', '-DFASTRES_CUDA_VERSION="emulation"']
    flags = [*SANITIZERS[sanitizer], "-fvisibility=hidden", *told, *includes]
    sources = [*kernels(), CSRC / "bindings" / "cuda_module.cpp"]
    return _build("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"), sources, flags, ["-shared"])


def build_program(name: str, sources: Iterable[Path], sanitizer: str) -> Path:
    """The path of an executable; ``sanitizer`` is a key of SANITIZERS."""
    return _build(name, list(sources), SANITIZERS[sanitizer], [])


def run_program(
    program: Path, *arguments: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Runs what `build_program` built; its stderr comes with its stdout.

    Args:
        settings: of the emulation: ``SEED``, ``RESIDENT`` and ``OMIT``, see launch.h.
    """
    variables = _without_preload() | {"TSAN_OPTIONS": "halt_on_error=1"}
    # Leaks are looked for with ptrace, which containers do not have.
    variables |= {"ASAN_OPTIONS": "detect_leaks=0"}
    variables |= {f"FASTRES_CUDA_EMULATION_{name}": value for name, value in settings.items()}
    command = [str(program), *arguments]
    done = _captured(command, variables)
    if "unexpected memory mapping" in done.stdout:
        # Where addresses are more random than ThreadSanitizer can take.
        done = _captured(["setarch", "-R", *command], variables)
    return done


def _captured(command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def _without_preload() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def environment(sanitizer: str = "address") -> dict[str, str]:
    """What a Python process needs in its environment to load the module, and to choose it."""
    variables = {CHOICE: str(build_module(sanitizer))}
    if sanitizer != "none":
        found = [_output([f"-print-file-name={name}"]).strip() for name in RUNTIMES[sanitizer]]
        variables["LD_PRELOAD"] = ":".join(str(Path(path).resolve()) for path in found)
        # Python frees little of what it has when it ends.
        variables["ASAN_OPTIONS"] = "detect_leaks=0"
        variables["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return variables


def load() -> ModuleType:
    """Puts the module where fastres looks for its compiled kernels; call before importing fastres.

    Takes the one that the environment chose, else builds one without sanitizers.
    """
    path = os.environ.get(CHOICE) or str(build_module("none"))
    loader = importlib.machinery.ExtensionFileLoader("fastres._cuda", path)
    spec = importlib.util.spec_from_file_location("fastres._cuda", path, loader=loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastres._cuda"] = module
    loader.exec_module(module)
    return module


def _output(arguments: list[str]) -> str:
    return _captured([COMPILER, *arguments], _without_preload()).stdout


def _digest(texts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


def _headers() -> list[bytes]:
    folders = (CSRC / "cuda", CSRC / "include", CSRC / "bindings", HERE)
    return [path.read_bytes() for folder in folders for path in sorted(folder.rglob("*.h"))]


def _build(name: str, sources: list[Path], flags: list[str], link: list[str]) -> Path:
    """Compiles and links what is not in the cache yet."""
    common = [_output(["--version"]), *FLAGS, *flags, *_headers()]
    keys = [_digest([*common, str(source), source.read_bytes()]) for source in sources]
    target = CACHE / _digest([*keys, *link]) / name
    CACHE.mkdir(mode=0o700, exist_ok=True)
    with FileLock(CACHE / f"{_digest([COMPILER, *flags])}.lock"):
        if not target.exists():
            _prune()
            _compile(dict(zip(sources, keys, strict=True)), flags)
            objects = [str(_object(key)) for key in keys]
            target.parent.mkdir(exist_ok=True)
            partial = target.with_suffix(".partial")
            _run([COMPILER, *FLAGS, *flags, *link, *objects, "-o", str(partial)])
            partial.replace(target)
        os.utime(target.parent)
    return target


def _object(key: str) -> Path:
    return CACHE / f"{key}.o"


def _compile(keys: dict[Path, str], flags: list[str]) -> None:
    """Compiles the sources without an object file, ``MAX_JOBS`` at a time, the largest first."""

    def compile_one(source: Path) -> None:
        target = _object(keys[source])
        if target.exists():
            return os.utime(target)
        partial = target.with_suffix(".partial")
        arguments = [COMPILER, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(partial)]
        _run(arguments)
        partial.replace(target)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, sorted(keys, key=lambda s: s.stat().st_size, reverse=True)))


def _run(arguments: list[str]) -> None:
    # A compiler under a preloaded sanitizer is slow.
    done = _captured(arguments, _without_preload())
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stdout}")


def _prune() -> None:
    for path in CACHE.iterdir():
        if path.suffix != ".lock" and path.stat().st_mtime < time.time() - KEPT_SECONDS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sanitizer", choices=RUNTIMES, default="address")
    parser.add_argument(
        "--environment", action="store_true", help="print KEY=value lines for env, not the path"
    )
    options = parser.parse_args()
    if not options.environment:
        return print(build_module(options.sanitizer))
    for name, value in environment(options.sanitizer).items():
        print(f"{name}={value}")


if __name__ == "__main__":
    main()
