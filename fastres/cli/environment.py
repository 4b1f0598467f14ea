"""The environment variables that fastres reads: the one table behind `doctor` and the docs."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """An environment variable: its name, when it is read, what it takes, and what it does."""

    name: str
    read: str
    values: str
    default: str
    meaning: str

    @property
    def value(self) -> str | None:
        """What it is set to in this process, or None."""
        return os.environ.get(self.name)


VARIABLES = (
    Variable(
        "FASTRES_BACKEND",
        "first block",
        "auto, cpu, cuda, triton, aten, reference",
        "auto",
        "the backend that runs blocks, as fastres.use_backend",
    ),
    Variable(
        "FASTRES_MEMORY",
        "first block",
        "auto, speed, balanced, lean",
        "auto",
        "what blocks keep for backward, as fastres.use_memory",
    ),
    Variable(
        "FASTRES_AUTOTUNE",
        "first block",
        "0, 1",
        "1",
        "measure which kernel is fastest on a GPU; 0 takes what ships with fastres",
    ),
    Variable(
        "FASTRES_CACHE_DIR",
        "first block",
        "a folder",
        "~/.cache/fastres",
        "where the autotuner keeps what it measured",
    ),
    Variable(
        "FASTRES_LEVEL",
        "first block",
        "auto, b, b', c', c",
        "auto",
        "what is fused into the convolutions, as fastres.use_level",
    ),
    Variable(
        "FASTRES_EXTENSIONS",
        "first block",
        "0, 1",
        "1",
        "import what installed packages add to fastres, docs/extending.md; 0 leaves them out",
    ),
    Variable(
        "FASTRES_CPU_ISA",
        "import",
        "avx512_bf16, avx512, avx2, baseline",
        "the best this CPU has",
        "the instruction set of the C++ kernels",
    ),
    Variable(
        "FASTRES_CPU_CACHE_MB",
        "import",
        "MiB",
        "what was in use at the peak",
        "upper bound of the memory that the CPU allocator keeps between blocks",
    ),
    Variable(
        "FASTRES_POISON",
        "import",
        "0, 1",
        "0",
        "fill every allocation of the CPU allocator with NaN, to find reads of unwritten memory",
    ),
    Variable(
        "FASTRES_CPU",
        "build",
        "0, 1",
        "built where it can be",
        "0 leaves the C++ kernels out of the build, 1 makes a build without them an error",
    ),
    Variable(
        "FASTRES_CUDA",
        "build",
        "0, 1",
        "built where nvcc is",
        "0 leaves the CUDA C++ kernels out of the build, 1 makes a build without them an error",
    ),
    Variable(
        "FASTRES_CUDA_ARCHS",
        "build",
        "a list, as in the default",
        "80;90a;100+PTX",
        "GPU architectures to build for; +PTX adds code that later GPUs compile when it is loaded",
    ),
    Variable(
        "CUDA_HOME",
        "build",
        "a folder",
        "CUDA_PATH, else nvcc on PATH, else /usr/local/cuda",
        "the CUDA toolkit to build with",
    ),
    Variable(
        "MAX_JOBS",
        "build",
        "a number",
        "one per core; of nvcc as many as fit in memory",
        "compilers that run at once",
    ),
)


def markdown() -> str:
    """The table as docs/environment.md carries it."""
    rows = [("variable", "read at", "values", "default", "what it does"), ("---",) * 5]
    rows += [(f"`{v.name}`", v.read, v.values, v.default, v.meaning) for v in VARIABLES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
