"""The compiled extensions of fastres; everything else stands in pyproject.toml.

``fastres._cpu`` needs a C++20 compiler, ``fastres._cuda`` nvcc as well, and neither anything of
torch. ``FASTRES_CPU=0`` or ``FASTRES_CUDA=0`` leaves one out, ``=1`` makes a build without it an
error; by default a failure is a warning, and fastres runs without it. ``CXX`` names the compiler,
``CUDA_HOME`` the CUDA toolkit, ``FASTRES_CUDA_ARCHS`` the GPUs to build for, and ``MAX_JOBS``
bounds the parallel jobs.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

CODE = ["-std=c++20", "-O3", "-DNDEBUG"]
# No fast-math. A multiply-add is fused where the code says so, never where the compiler likes.
HOST = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
HOST += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
ISAS: dict[str, list[str]] = {"baseline": []}
X86: list[str] = []
if platform.machine().lower() in ("x86_64", "amd64"):
    X86 = ["-DFASTRES_HAS_X86"]
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    ISAS["avx512"] += ["-mprefer-vector-width=512", *ISAS["avx2"]]
    # gcc 12 takes the deliberately undefined registers of its own intrinsics for a mistake.
    ISAS["avx512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    # What this one has of its own: convolutions by dot products of pairs.
    ISAS["avx512_bf16"] = ["-mavx512bf16", *ISAS["avx512"]]
KERNELS = ["channel_stats", "scale_shift_act", "backward_reduce", "backward_apply"]
CONVOLUTIONS = ["activation", "pack_weight", "convolution", "weight_gradient"]
KERNELS += ["pointwise", "max_pool", "pack_winograd", *CONVOLUTIONS]
ONCE = ["cpu/dispatch", "cpu/finalize_stats", "cpu/update_running", "cpu/parameters"]
ONCE += ["cpu/program", "cpu/allocator"]

#: What FASTRES_CUDA_ARCHS is where it is not set: the first that nvcc knows all of. PTX is compiled
#: by the driver, for every later GPU. nvcc knows 100 from 12.8 on.
CUDA_ARCHS = ("80;90a;100+PTX", "80+PTX;90a")
#: The kernels' own minimum: arithmetic in bfloat16.
OLDEST_ARCH = 80
#: Memory for one nvcc: at its peak it took 0.4 GiB (13.0).
NVCC_BYTES = 1 << 30


# ---------------------------------------------------------------- ninja


class Unit(NamedTuple):
    """A source file, its object file's name, and the flags that are its own."""

    source: Path
    name: str
    flags: list[str]


class Recipe(NamedTuple):
    """How a module is built: compilers by suffix, with their common flags; units; the link.

    ``pools`` bounds how many compilers of a suffix run at once.
    """

    compilers: dict[str, str]
    units: list[Unit]
    link: str
    pools: dict[str, int]


def escape(path: Path | str) -> str:
    """A path as ninja and the shell both read it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def joined(flags: list[str]) -> str:
    """Flags as ninja and the shell both read them."""
    return shlex.join(flags).replace("$", "$$")


def ninja_file(recipe: Recipe, output: Path) -> str:
    """The text of build.ninja for a module, with object files beside it."""
    lines = ["ninja_required_version = 1.5"]
    for suffix, command in recipe.compilers.items():
        pool = recipe.pools.get(suffix)
        lines += [f"pool {suffix}", f"  depth = {pool}"] if pool else []
        lines += [
            f"rule compile_{suffix}",
            f"  command = {command} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            *([f"  pool = {suffix}"] if pool else []),
        ]
    lines += ["rule link", f"  command = {recipe.link}", "  description = $out"]
    for source, name, flags in recipe.units:
        lines.append(f"build {name}.o: compile_{source.suffix[1:]} {escape(source)}")
        lines.append(f"  flags = {joined(flags)}")
    objects = " ".join(f"{unit.name}.o" for unit in recipe.units)
    lines.append(f"build {escape(output)}: link {objects}")
    return "\n".join(lines) + "\n"


def ninja_command() -> list[str]:
    """Ninja from PATH, or from the wheel that build isolation installed."""
    found = shutil.which("ninja")
    jobs = max_jobs()
    command = [found] if found else [sys.executable, "-m", "ninja"]
    return command + (["-j", str(jobs)] if jobs else [])


def max_jobs() -> int | None:
    """$MAX_JOBS."""
    jobs = os.environ.get("MAX_JOBS")
    if jobs and not (jobs.isdigit() and int(jobs) > 0):
        raise SystemExit(f"error: MAX_JOBS must be a positive number, got {jobs!r}")
    return int(jobs) if jobs else None


# ---------------------------------------------------------------- fastres._cpu


def compiler() -> str:
    """The C++ compiler: $CXX, or the first one that is there."""
    given = os.environ.get("CXX")
    if given and shutil.which(shlex.split(given)[0]) is None:
        raise RuntimeError(f"CXX must name a C++ compiler, got {given!r}")
    found = given or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
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


def binding(name: str, flags: list[str]) -> Unit:
    """A pybind11 module's own file."""
    import pybind11

    includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
    flags = [*flags, *(f"-I{path}" for path in includes)]
    return Unit(CSRC / "bindings" / f"{name}.cpp", f"bindings_{name}", flags)


def included() -> list[str]:
    """The folders that every source file includes from."""
    return [f"-I{CSRC}", f"-I{CSRC / 'include'}"]


def link(cxx: str, flags: list[str]) -> str:
    """The command that links a module."""
    macos = sys.platform == "darwin"
    flags = ["-shared", *(["-undefined", "dynamic_lookup"] if macos else ["-s"]), *flags]
    return f"{cxx} $in {joined(flags)} {os.environ.get('LDFLAGS', '')} -o $out"


def cpu_recipe() -> Recipe:
    """Kernels once per instruction set, and what is there once."""
    cxx = compiler()
    openmp = openmp_flags(cxx)
    flags = [*CODE, *HOST, *X86, *openmp, *included()]
    units = [Unit(CSRC / f"{name}.cpp", name.replace("/", "_"), []) for name in ONCE]
    units += [binding("cpu_module", []), binding("cpu_program", [])]
    for isa, isa_flags in ISAS.items():
        names = CONVOLUTIONS if isa == "avx512_bf16" else KERNELS
        own = [f"-DFASTRES_ISA={isa}", *isa_flags]
        units += [Unit(CSRC / "cpu" / f"{name}.cpp", f"{isa}_{name}", own) for name in names]
    return Recipe({"cpp": f"{cxx} {joined(flags)}"}, units, link(cxx, openmp), {})


# ---------------------------------------------------------------- fastres._cuda


class Toolkit(NamedTuple):
    """A CUDA toolkit: its compiler and that one's version, what it knows, where its libraries are.

    ``archs`` are without letters: nvcc lists sm_90, and knows sm_90a too.
    """

    nvcc: str
    version: str
    archs: list[str]
    libraries: list[str]


def nvcc() -> str:
    """The path of nvcc. A toolkit that was named is not quietly replaced by another one."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            found = shutil.which("nvcc", path=str(Path(home, "bin")))
            if found is None:
                raise RuntimeError(f"{variable} must be a folder with bin/nvcc, got {home!r}")
            return found
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise RuntimeError(
            "no nvcc found (looked in $CUDA_HOME, $CUDA_PATH, $PATH and /usr/local/cuda); install "
            "the CUDA toolkit, or set CUDA_HOME to its folder"
        )
    return found


def toolkit() -> Toolkit:
    """What nvcc says of itself: also behind a wrapper script it knows where its libraries are."""
    command = nvcc()

    def ask(*flags: str) -> str:
        done = subprocess.run([command, *flags], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join([command, *flags])} failed: {done.stderr.strip()}")
        return done.stdout + done.stderr

    version = re.search(r"\bV(\d+)([.\d]*)", ask("--version"))
    if version is None or int(version[1]) < 12:
        got = version[0] if version else "no version"
        raise RuntimeError(f"nvcc must be of CUDA 12.0 or newer, for C++20, got {got} of {command}")
    listed = re.findall(r"\bsm_(\d+)\b", ask("--list-gpu-code"))
    archs = sorted({a for a in listed if int(a) >= OLDEST_ARCH}, key=int)
    described = ask("--dryrun", "-c", "-x", "cu", os.devnull)
    libraries = re.findall(r"^#\$ LIBRARIES=(.*)", described, re.MULTILINE)
    return Toolkit(command, version[1] + version[2], archs, shlex.split(" ".join(libraries)))


def architectures(known: Toolkit) -> list[str]:
    """$FASTRES_CUDA_ARCHS, or what is built without it: the likes of "80", "90a" and "100+PTX"."""

    def wrong(arch: str) -> bool:
        found = re.fullmatch(r"(\d+)[af]?(?:\+PTX)?", arch)
        return found is None or found[1] not in known.archs

    given = os.environ.get("FASTRES_CUDA_ARCHS")
    choices = [given] if given else CUDA_ARCHS
    for choice in choices:
        archs = list(dict.fromkeys(re.split(r"[;,\s]+", choice.strip(";, "))))
        if not any(map(wrong, archs)):
            return archs
    if not given:
        raise RuntimeError(
            f"nvcc {known.version} knows none of {CUDA_ARCHS}; name others by FASTRES_CUDA_ARCHS"
        )
    raise SystemExit(
        "error: FASTRES_CUDA_ARCHS must list GPU architectures, as in '80;90a;100+PTX', that nvcc "
        f"{known.version} knows ({', '.join(known.archs)}), got {choices[-1]!r}"
    )


def gencode(arch: str) -> str:
    """nvcc's flag for an architecture: machine code, and PTX where that is asked for."""
    number, _, ptx = arch.partition("+")
    codes = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={codes}"


def bound() -> int:
    """How many nvcc memory holds at once; the number of cores bounds them all the same."""
    available = [1 << 40]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
        available += [int(found[1]) << 10] if found else []
    group = Path("/sys/fs/cgroup/memory.max")  # a container's own limit
    if group.exists() and group.read_text().strip().isdigit():
        available.append(int(group.read_text()))
    return max(1, min(available) // NVCC_BYTES)


def device_flags(cxx: str, cuda: Toolkit, archs: list[str]) -> list[str]:
    """nvcc's flags, and among them those of the host's compiler."""
    # A launcher before the compiler, as in "ccache g++", is none that nvcc could call.
    host = ["-ccbin", cxx] if len(shlex.split(cxx)) == 1 else []
    host.append(f"-Xcompiler={','.join(HOST)}")
    # The version stands here for ninja: another nvcc makes other commands.
    version = f'-DFASTRES_CUDA_VERSION="{cuda.version}"'
    return [*CODE, "-fmad=false", *map(gencode, archs), *host, *included(), version]


def cuda_recipe() -> Recipe:
    """The kernels by nvcc, the binding by the host's compiler; CUDA's runtime is linked in."""
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"it is built on Linux only, got {sys.platform!r}")
    cuda, cxx = toolkit(), compiler()
    archs = architectures(cuda)
    names = {"VERSION": cuda.version, "ARCHS": ";".join(archs)}
    units = [Unit(path, path.stem, []) for path in sorted((CSRC / "cuda").glob("*.cu"))]
    units.append(binding("cuda_module", [f'-DFASTRES_CUDA_{k}="{v}"' for k, v in names.items()]))
    compilers = {
        "cu": f"{shlex.quote(cuda.nvcc)} {joined(device_flags(cxx, cuda, archs))}",
        "cpp": f"{cxx} {joined([*CODE, *HOST, *included()])}",
    }
    static = [*cuda.libraries, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    static.append("-Wl,--exclude-libs,ALL")  # a process may hold another CUDA runtime: torch's
    pools = {} if max_jobs() else {"cu": bound()}
    return Recipe(compilers, units, link(cxx, static), pools)


# ---------------------------------------------------------------- setuptools


class Module(NamedTuple):
    """An extension: the variable that asks for it, its recipe, and what its absence means."""

    variable: str
    recipe: Callable[[], Recipe]
    without: str

    def wanted(self) -> str:
        """0: leave it out, 1: it must be there, auto: where it can be built."""
        value = os.environ.get(self.variable) or "auto"
        if value not in ("0", "1", "auto"):
            raise SystemExit(f"error: {self.variable} must be 0, 1 or auto, got {value!r}")
        return value


MODULES = {
    "fastres._cpu": Module("FASTRES_CPU", cpu_recipe, "more slowly on a CPU"),
    "fastres._cuda": Module("FASTRES_CUDA", cuda_recipe, "with other kernels on a GPU"),
}


class BuildWithNinja(build_ext):
    """Writes build.ninja and runs ninja. Without a compiler the install goes on without it."""

    def build_extension(self, ext: Extension) -> None:
        module = MODULES[ext.name]
        try:
            self.run_ninja(ext, module.recipe())
        except (RuntimeError, OSError, ImportError) as error:
            said = f"{ext.name} was not built: {error}."
            if module.wanted() == "1":
                raise SystemExit(f"error: {said} {module.variable}=0 leaves it out.") from None
            print(
                f"warning: {said} fastres works without it, {module.without}. Set "
                f"{module.variable}=1 to make this an error.",
                file=sys.stderr,
            )

    def run_ninja(self, ext: Extension, recipe: Recipe) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # Not build_temp, which is a new folder for every editable install: what did not change is
        # not compiled again.
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / tag / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(recipe, output))
        if subprocess.run([*ninja_command(), "-C", str(folder)]).returncode != 0:
            raise RuntimeError("a compiler failed, and says why above")


setup(
    packages=[
        *find_packages(include=["fastres", "fastres.*"]),
        "fastres.bench",
        "fastres.triton_kernels",
        *(f"fastres.triton_kernels.{name}" for name in find_packages(str(ROOT / "triton_kernels"))),
    ],
    # Optional: an editable install, too, goes on without what was not built.
    ext_modules=[
        Extension(name, [], optional=True) for name, m in MODULES.items() if m.wanted() != "0"
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
