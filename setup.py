"""The compiled extension of fastres; everything else stands in pyproject.toml.

``fastres._cpu`` needs a C++20 compiler and nothing of torch. ``FASTRES_CPU=0`` leaves it out,
``FASTRES_CPU=1`` makes a build without it an error; by default a failure is a warning, and
fastres runs without it. ``CXX`` names the compiler, ``MAX_JOBS`` bounds the parallel jobs.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# No fast-math. A multiply-add is fused where the code says so, never where the compiler likes.
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-DNDEBUG"]
ISAS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-DFASTRES_HAS_X86")
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    ISAS["avx512"] += ["-mprefer-vector-width=512", *ISAS["avx2"]]
    # gcc 12 takes the deliberately undefined registers of its own intrinsics for a mistake.
    ISAS["avx512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
KERNELS = ["channel_stats", "scale_shift_act", "backward_reduce", "backward_apply", "pointwise"]
ONCE = ["cpu/dispatch", "cpu/finalize_stats", "cpu/allocator", "bindings/cpu_module"]


def compiler() -> str:
    """The C++ compiler: $CXX, or the first one that is there."""
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        raise RuntimeError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")
    return found


def openmp_flags(cxx: str) -> list[str]:
    """-fopenmp where the compiler knows it; the kernels run on one thread otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_num_threads() - 1; }\n")
        command = [*shlex.split(cxx), "-fopenmp", str(source), "-o", str(Path(folder, "probe"))]
        return ["-fopenmp"] if subprocess.run(command, capture_output=True).returncode == 0 else []


def escape(path: Path | str) -> str:
    """A path as ninja and the shell both read it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(cxx: str, output: Path, extra_includes: list[str]) -> str:
    """The text of build.ninja for the CPU extension, with object files beside it."""
    includes = [str(CSRC), str(CSRC / "include"), sysconfig.get_paths()["include"], *extra_includes]
    openmp = openmp_flags(cxx)
    cxxflags = [*FLAGS, *openmp, *(f"-I{shlex.quote(path)}" for path in includes)]
    macos = sys.platform == "darwin"
    link = ["-shared", *openmp, *(["-undefined", "dynamic_lookup"] if macos else ["-s"])]
    units = [(source, source.replace("/", "_"), []) for source in ONCE]
    for isa, isa_flags in ISAS.items():
        define = f"-DFASTRES_ISA={isa}"
        units += [(f"cpu/{name}", f"{isa}_{name}", [define, *isa_flags]) for name in KERNELS]
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {cxx}",
        f"cxxflags = {' '.join(cxxflags)}",
        f"ldflags = {' '.join(link)} {os.environ.get('LDFLAGS', '')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $cxxflags $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
        "  description = $out",
    ]
    for source, name, flags in units:
        lines.append(f"build {name}.o: compile {escape(CSRC / source)}.cpp")
        lines.append(f"  flags = {' '.join(flags)}")
    objects = " ".join(f"{name}.o" for _, name, _ in units)
    lines.append(f"build {escape(output)}: link {objects}")
    return "\n".join(lines) + "\n"


def ninja_command() -> list[str]:
    """Ninja from PATH, or from the wheel that build isolation installed."""
    found = shutil.which("ninja")
    jobs = os.environ.get("MAX_JOBS")
    command = [found] if found else [sys.executable, "-m", "ninja"]
    return command + (["-j", jobs] if jobs else [])


class BuildWithNinja(build_ext):
    """Writes build.ninja and runs ninja. Without a compiler the install goes on without it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_cpu(ext)
        except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("FASTRES_CPU") == "1":
                raise
            print(
                f"warning: fastres._cpu was not built ({error}). fastres works without it, more "
                "slowly on a CPU. Set FASTRES_CPU=1 to make this an error.",
                file=sys.stderr,
            )

    def build_cpu(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp, ext.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(
            ninja_file(compiler(), output, [pybind11.get_include()])
        )
        subprocess.run([*ninja_command(), "-C", str(folder)], check=True)


extensions = [Extension("fastres._cpu", [], optional=True)]

setup(
    packages=[
        *find_packages(include=["fastres", "fastres.*"]),
        "fastres.triton_kernels",
        *(f"fastres.triton_kernels.{name}" for name in find_packages(str(ROOT / "triton_kernels"))),
    ],
    ext_modules=[] if os.environ.get("FASTRES_CPU") == "0" else extensions,
    cmdclass={"build_ext": BuildWithNinja},
)
