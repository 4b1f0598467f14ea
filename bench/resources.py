"""`python -m bench resources`: what the kernels of ResNet-50 take, compiled ahead of time.

Every Triton kernel, dtype and flag that ResNet-50 at 224 pixels and batch 256 launches is compiled
for three generations of NVIDIA GPUs, with the launch shapes that stand where nothing was measured;
the CUDA C++ kernels are read off the compiled module. No GPU is needed. Writes docs/kernels.md,
each kind into its own section.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

import fastres
from fastres.kernels.triton.launch import Launch
from fastres.testing.ahead import (
    DEVICES,
    Resources,
    compiled,
    described_launches,
    resnet_launches,
)

from . import cuda_resources

PATH = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: (level of fusion, training): between them all kernels and flags are launched.
RUNS = (("b", True), ("b'", True), ("c'", True), ("c", True), ("c'", False))
IMAGES = (256, 224)

#: Flags that select code; the rest of the constants are sizes.
_GEOMETRY = ("TAPS_H", "TAPS_W", "STRIDE_H")


class Row(NamedTuple):
    """A compiled kernel: which, in which variant, and what it takes."""

    kernel: str
    variant: str
    tile: str
    capability: int
    dtype: str
    resources: Resources


def launches(dtype: torch.dtype, capability: int) -> list[Launch]:
    """One launch for each binary that ResNet-50 needs."""
    by_key: dict[object, Launch] = {}
    launches: list[Launch] = []
    device = DEVICES[capability]
    for level, training in RUNS:
        model = fastres.models.resnet50()
        launches += resnet_launches(model, IMAGES, dtype, device, level, training)
    if device.copy_engine:
        launches += described_launches(dtype, device)
    for one in launches:
        by_key.setdefault((one.kernel, one.dtypes, one.constants, one.num_warps), one)
    return list(by_key.values())


def variant(launch: Launch) -> str:
    """The flags of a launch that are set, and its convolution's geometry, in words."""
    constants = dict(launch.constants)
    words = []
    if "TAPS_H" in constants:
        taps_h, taps_w, stride = (constants[name] for name in _GEOMETRY)
        words.append(f"{taps_h}x{taps_w}" + (f" stride {stride}" if stride > 1 else ""))
    for name, value in constants.items():
        if name in ("ACT", "ACT_X") and value is not None:
            word = value.fn.__name__.removesuffix("_operand")
            words += [word + name.removeprefix("ACT").lower()] if word != "identity" else []
        elif value is True and name != "CHANNELS_LAST":
            words.append(name.removeprefix("HAS_").lower())
        elif name in ("GATE", "BELOW_GATE") and value:
            words.append(f"{name.lower()} {('none', 'mask', 'affine', 'out')[value]}")
        elif name == "RESIDUAL" and value:
            words.append(("residual", "gated residual")[value - 1])
    return ", ".join(words)


def tile(launch: Launch) -> str:
    """The block sizes of a launch."""
    sizes = [v for k, v in launch.constants if k.startswith("BLOCK") or k in ("ROWS", "COLUMNS")]
    return "x".join(map(str, sizes))


def rows(dtype: str, capability: int) -> list[Row]:
    """Compile everything in one dtype for one capability."""
    return [
        Row(
            launch.kernel.__name__, variant(launch), tile(launch), capability, dtype,
            compiled(launch, capability),
        )
        for launch in launches(DTYPES[dtype], capability)
    ]  # fmt: skip


def everything() -> list[Row]:
    """All dtypes and capabilities, two compilers at a time."""
    pairs = [(dtype, capability) for dtype in DTYPES for capability in DEVICES]
    with ProcessPoolExecutor(2) as pool:
        results = pool.map(rows, *zip(*pairs, strict=True))
        return [row for part in results for row in part]


def put_section(path: Path, lines: Sequence[str]) -> None:
    """Write a section into a file, in place of the one of the same title; the first line is it."""
    text = path.read_text() if path.exists() else ""
    sections = {s.splitlines()[0]: s.strip() for s in re.split(r"(?m)^(?=# )", text) if s.strip()}
    sections[lines[0]] = "\n".join(lines)
    path.write_text("\n\n".join(sections.values()) + "\n")


def _document(found: list[Row]) -> Iterator[str]:
    yield "# Triton kernels, compiled ahead of time"
    yield ""
    yield "Written by `python -m bench resources`; nothing here ran on a GPU. Every kernel, dtype"
    yield "and flag that ResNet-50 at 224 pixels and batch 256 launches at the levels b to c and"
    yield "in inference, with the launch shapes that stand where nothing was measured; and"
    yield "`conv1x1_fwd_kernel` (tensor descriptors), which the autotuner may choose."
    yield ""
    yield "Registers per thread / shared memory per program in KiB, for compute capability 8.0,"
    yield f"9.0 and 10.0. Stack and local memory are 0: of {len(found)} binaries none spills."
    bad = [r for r in found if r.resources.stack or r.resources.local]
    if bad:
        raise RuntimeError(f"{len(bad)} binaries spill, the first: {bad[0][:5]}")
    by_dtype: dict[str, dict[tuple[str, str], dict[int, list[Row]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in found:
        by_dtype[row.dtype][row.kernel, row.variant][row.capability].append(row)
    for dtype, kernels in by_dtype.items():
        yield from ("", f"## {dtype}", "", "| kernel | variant | 8.0 | 9.0 | 10.0 |")
        yield "|---|---|---|---|---|"
        for (kernel, words), per_device in kernels.items():
            cells = [_cell(per_device[capability]) for capability in DEVICES]
            yield f"| `{kernel}` | {words} | {' | '.join(cells)} |"


def _cell(same: list[Row]) -> str:
    """The largest figures of a kernel over its tiles."""
    if not same:
        return "-"
    registers = max(r.resources.registers for r in same)
    shared = max(r.resources.shared for r in same)
    return f"{registers} / {round(shared / 1024, 1):g}"


#: What can be written, and how its section is made; the quick one first.
SECTIONS = {
    "cuda": cuda_resources.built_section,
    "triton": lambda: list(_document(everything())),
}


def main(arguments: Sequence[str]) -> int:
    """Compile, and write docs/kernels.md."""
    parser = argparse.ArgumentParser(prog="python -m bench resources", description=__doc__)
    parser.add_argument("--out", type=Path, default=PATH, help="the file to write")
    parser.add_argument("--only", choices=SECTIONS, help="leave the other section as it is")
    options = parser.parse_args(arguments)
    for name in [options.only] if options.only else SECTIONS:
        put_section(options.out, SECTIONS[name]())
    print(f"written to {options.out}")
    return 0
