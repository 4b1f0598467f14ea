"""What the kernels of `fastres._cuda` take, read off the compiled module; no GPU is needed.

`cuobjdump`, which comes with Triton, shows the resources and the machine code of every instance
of a kernel for every architecture that the module was built for.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
TITLE = "# CUDA C++ kernels, compiled ahead of time"
#: Architectures, as setup.py builds them where nothing else is asked for.
ARCHS = ("80", "90a", "100")
#: Threads of the largest block, and registers of a multiprocessor.
MOST_THREADS, REGISTER_FILE = 256, 65536

_DTYPES = {"float": "fp32", "fastres::BFloat16": "bf16", "fastres::Float16": "fp16"}


class Binary(NamedTuple):
    """An instance of a kernel for one architecture.

    Attributes:
        kernel: its name, say "scale_shift_act_kernel".
        dtype: of activations: fp32, bf16 or fp16; "" where it reads none.
        variant: its other template arguments in words.
        arch: "80", "90a" or "100".
        registers: per thread.
        stack: bytes per thread; spilled registers lie there.
        local: bytes of local memory per thread.
        shared: bytes of shared memory per block that are known at compile time.
        accesses: memory instructions of its machine code, say {"LDG.E.128": 4}.
    """

    kernel: str
    dtype: str
    variant: str
    arch: str
    registers: int
    stack: int
    local: int
    shared: int
    accesses: Counter[str]

    def count(self, pattern: str) -> int:
        """How many of its memory instructions match."""
        return sum(n for name, n in self.accesses.items() if re.fullmatch(pattern, name))


def module_path() -> Path | None:
    """The compiled module, or None where it was not built."""
    spec = importlib.util.find_spec("fastres._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def binaries(library: Path) -> list[Binary]:
    """Every instance of every kernel, for every architecture."""
    figures = dict(_figures(library))
    with ThreadPoolExecutor(2) as pool:
        archs = dict.fromkeys(arch for arch, _ in figures)
        accesses = dict(zip(archs, pool.map(lambda a: _accesses(library, a), archs), strict=True))
    names = _names({name for _, name in figures})
    files = [
        Binary(*names[name], arch, *(took[k] for k in ("REG", "STACK", "LOCAL", "SHARED")),
               accesses[arch][name])
        for (arch, name), took in figures.items()
    ]  # fmt: skip
    return sorted(files, key=lambda b: (b.kernel, b.variant))


def _cuobjdump(*arguments: str | Path) -> subprocess.Popen[str]:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    with process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode != 0:
        raise RuntimeError(f"{process.args!r} failed")


def _figures(library: Path) -> Iterator[tuple[tuple[str, str], dict[str, int]]]:
    arch = name = ""
    for line in _lines(_cuobjdump("-res-usage", library)):
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):$", line):
            name = match[1]
        elif "REG:" in line:
            yield (arch, name), {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}


def _accesses(library: Path, arch: str) -> dict[str, Counter[str]]:
    """The memory instructions of every function: global, generic and local ones, copies."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    name = ""
    names = r"(?:LDGSTS|(?:LD|ST)[GL]?)(?:\.\w+)*"
    instruction = re.compile(rf"\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?({names}) ")
    for line in _lines(_cuobjdump("-sass", "-arch", f"sm_{arch}", library)):
        if match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
        elif match := instruction.match(line):
            counts[name][match[1]] += 1
    return counts


# ---------------------------------------------------------------- names


def _names(mangled: set[str]) -> dict[str, tuple[str, str, str]]:
    """Kernel, dtype and variant of each mangled name."""
    ordered = sorted(mangled)
    command = ["c++filt", *ordered]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    parameters = dict(_template_parameters())
    return {m: _described(p, parameters) for m, p in zip(ordered, plain, strict=True)}


def _template_parameters() -> Iterator[tuple[str, list[str]]]:
    """The names of every kernel's template parameters, from its source."""
    pattern = re.compile(r"template <([^<>]*)>\s*__global__ [^;{]*?\b(\w+_kernel)\(")
    for path in sorted(SOURCES.glob("*.cu")):
        for parameters, kernel in pattern.findall(path.read_text()):
            yield kernel, [p.split()[-1] for p in parameters.split(",")]


def _described(name: str, parameters: dict[str, list[str]]) -> tuple[str, str, str]:
    match = re.search(r"::(\w+_kernel)(?:<(.*?)>)?\(", name)
    if match is None:
        raise ValueError(f"kernels must be called ..._kernel, got {name}")
    arguments = match[2].split(", ") if match[2] else []
    values = dict(zip(parameters.get(match[1], []), arguments, strict=True))
    dtype = _DTYPES[values.pop("T")] if "T" in values else ""
    words = [_word(k, v) for k, v in values.items()]
    return match[1], dtype, ", ".join(w for w in words if w)


def _word(parameter: str, value: str) -> str:
    """kPack = 8: "pack 8"; kPerColumn = true: "per column"."""
    word = re.sub(r"(?<!^)(?=[A-Z])", " ", parameter.removeprefix("k")).lower()
    return {"true": word, "false": ""}.get(value, f"{word} {value}")


# ---------------------------------------------------------------- what must hold


def spilling(found: Iterable[Binary]) -> list[Binary]:
    """Those with a stack, with local memory, or with instructions that use it."""
    return [b for b in found if b.stack or b.local or b.count(r"(LD|ST)L\b.*")]


def too_many_registers(found: Iterable[Binary]) -> list[Binary]:
    """Those of which not even one largest block fits on a multiprocessor."""
    return [b for b in found if b.registers * MOST_THREADS > REGISTER_FILE]


def narrow(found: Iterable[Binary]) -> list[Binary]:
    """Kernels on packs of 8 elements in 16 bits that do not move every pack by 128-bit accesses.

    A pack in float32 takes two such accesses, so an instance in 16 bits has half as many of them
    as its float32 sibling. A pack that is taken apart would show as fewer. What there is in 16 bits
    alone copies packs into a pipeline in shared memory.
    """
    wide = {b[:4]: b for b in found if b.dtype and "pack 1" not in b.variant}
    bad = []
    for one in wide.values():
        sibling = wide.get((one.kernel, "fp32", *one[2:4]))
        elements = 0 if one.dtype == "fp32" else one.count(r"(LD|ST)G?\.E\.[US]16.*")
        whole = _whole_packs(one, sibling) if sibling else one.count(r"LDGSTS\.E\..*\b128") > 0
        if elements or not whole:
            bad.append(one)
    return bad


def _whole_packs(one: Binary, sibling: Binary) -> bool:
    halves = 1 if one.dtype == "fp32" else 2
    pairs = [(one.count(p), sibling.count(p)) for p in (r"LDG\.E\.128.*", r"STG\.E\.128.*")]
    return pairs[0][0] > 0 and all(halves * n == of_float for n, of_float in pairs)


# ---------------------------------------------------------------- docs/kernels.md


def section(found: list[Binary], toolkit: str) -> Iterator[str]:
    """The section of docs/kernels.md.

    Raises:
        RuntimeError: where what it says does not hold.
    """
    for wrong in (spilling, too_many_registers, narrow):
        if bad := wrong(found):
            raise RuntimeError(f"{wrong.__name__}: {len(bad)} binaries, the first: {bad[0]}")
    yield TITLE
    yield ""
    yield "Written by `python -m bench resources`; nothing here ran on a GPU. Every instance of"
    yield f"every kernel in `fastres._cuda`, by nvcc {toolkit}: {len(found)} binaries. None has a"
    yield "stack, spills, or touches local memory. A pack of 8 elements is one 128-bit access in 16"
    yield "bits, and two in fp32."
    yield ""
    yield "Registers per thread, for compute capability 8.0, 9.0 and 10.0. Shared memory is sized"
    yield "at launch; static shared memory, where there is any, follows in KiB."
    rows: dict[tuple[str, str], dict[str, dict[str, Binary]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for one in found:
        rows[one.kernel, one.variant][one.dtype][one.arch] = one
    dtypes = sorted({b.dtype for b in found if b.dtype})
    for title, columns in ((", ".join(dtypes), dtypes), ("No activations", [""])):
        yield from _table(title, columns, rows)


def _table(title: str, dtypes: list[str], rows: Any) -> Iterator[str]:
    heads = [f"{dtype} {number}".strip() for dtype in dtypes for number in ("8.0", "9.0", "10.0")]
    yield from ("", f"## {title}", "")
    yield f"| kernel | variant | {' | '.join(heads)} |"
    yield "|" + "---|" * (2 + len(heads))
    for (kernel, variant), by_dtype in rows.items():
        if dtypes[0] in by_dtype:
            cells = [_cell(by_dtype[dtype].get(arch)) for dtype in dtypes for arch in ARCHS]
            yield f"| `{kernel}` | {variant} | {' | '.join(cells)} |"


def _cell(one: Binary | None) -> str:
    if one is None:
        return "-"
    # From 9.0 on, the system's 1 KiB is counted for a kernel with dynamic shared memory.
    shared = one.shared - (1024 if one.arch != "80" and one.shared >= 1024 else 0)
    return f"{one.registers} / {round(shared / 1024, 1):g}" if shared else f"{one.registers}"


def built_section() -> list[str]:
    """The section of the module that is installed.

    Raises:
        RuntimeError: where there is none, or what the section says does not hold.
    """
    path = module_path()
    if path is None:
        raise RuntimeError("fastres._cuda must be built; fastres doctor says how")
    from fastres import _cuda

    return list(section(binaries(path), _cuda.toolkit()))
