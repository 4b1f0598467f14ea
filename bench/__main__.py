"""`python -m bench`: the CPU block benchmark, its results, and README's table.

`python -m bench kernels` times single implementations instead, `convolutions` Triton's fused
convolutions beside cuDNN's, `launches` what a launch costs on the host; `resources` says what
the GPU kernels take once compiled, and writes docs/kernels.md.

Writes bench/results/<date>-<cpu>-blocks.json (append-only: a new file each run) and, with
--readme, the section of README.md between the markers `bench:begin` and `bench:end`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bench import convolutions, launches, registry, resources
from bench.conditions import ROOT, conditions, stamp
from bench.kernels import kernel_rows
from bench.race import Worker, race
from bench.readme import write_section
from bench.shapes import BLOCKS


def time_blocks(rounds: int, dtype: str) -> list[dict[str, Any]]:
    """Every block shape, training and inference: one dictionary per contender."""
    rows: list[dict[str, Any]] = []
    with Worker(kept=False) as fresh, Worker(kept=True) as kept:
        train = {
            "eager": (fresh, "eager"),
            "fastres": (fresh, "fastres"),
            "eager, kept": (kept, "eager"),
            "fastres, kept": (kept, "fastres"),
            "convolutions, kept": (kept, "convolutions"),
        }
        infer = {k: train[k] for k in ("eager", "fastres", "eager, kept", "fastres, kept")}
        for block in track(BLOCKS, description="blocks"):
            for mode, contenders in (("train", train), ("infer", infer)):
                timings = race(contenders, rounds, block=block, mode=mode, dtype=dtype)
                for name, t in timings.items():
                    rows.append(
                        {
                            "block": block,
                            "mode": mode,
                            "dtype": dtype,
                            "contender": name,
                            "ms": round(t.median, 2),
                            "low": round(t.low, 2),
                            "high": round(t.high, 2),
                        }
                    )
            for name in ("eager", "fastres"):
                saved = fresh.ask(what="saved", contender=name, mode="", block=block, dtype=dtype)
                rows.append({"block": block, "mode": "saved", "dtype": dtype, "contender": name,
                             "bytes": int(saved)})  # fmt: skip
    return rows


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="how often each contender is timed")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder for results")
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's table")
    options = parser.parse_args()
    torch.set_num_threads(2)
    found = conditions()
    kernels = [row for d in (torch.float32, torch.bfloat16) for row in kernel_rows(d)]
    result = {**found, "blocks": time_blocks(options.rounds, options.dtype),
              "kernels": kernels}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{stamp(found)}-cpu-{options.dtype}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    section = write_section(result, ROOT.parent / "README.md" if options.readme else None)
    Console().print(section, markup=False)
    print(f"written to {path}")


#: What else can be run: `python -m bench NAME`.
COMMANDS = {
    "kernels": registry.main,
    "convolutions": convolutions.main,
    "launches": launches.main,
    "resources": resources.main,
}

if __name__ == "__main__":
    command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is not None:
        sys.exit(command(sys.argv[2:]))
    main()
