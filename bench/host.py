"""`fastres bench host`: what a block costs where nearly nothing is computed, beside eager's.

A bottleneck on one image of 16 channels and 2x2 pixels, one thread: what is measured is Python, the
dispatcher and the calls of kernels, not their work. The path that GPUs take is measured without
one, as `stubbed_gpu.py` says.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastres
from fastres.nn import stock

ROUNDS, CALLS = 15, 200
SHAPE = (1, 16, 2, 2)

Thunks = dict[str, Callable[[], object]]


def thunks(block: nn.Module) -> Thunks:
    """What is measured of a block: forward, forward with backward, and inference."""
    x, grad = (torch.randn(SHAPE).contiguous(memory_format=torch.channels_last) for _ in range(2))
    leaf, frozen = x.clone().requires_grad_(), copy.deepcopy(block).eval()

    def inference() -> Tensor:
        with torch.no_grad():
            out: Tensor = frozen(x)
            return out

    return {
        "forward": lambda: block(leaf),
        "forward + backward": lambda: block(leaf).backward(grad),
        "inference": inference,
    }


def blocks() -> dict[str, nn.Module]:
    """The same bottleneck, stock and fused, in channels_last."""
    torch.manual_seed(0)
    eager = stock.Bottleneck(16, 4)
    fused = fastres.Bottleneck(16, 4)
    fused.load_state_dict(eager.state_dict())
    return {
        name: block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, block in (("eager", eager), ("fastres", fused))
    }


def python_calls(run: Callable[[], object], warm_up: int = 2) -> int:
    """How many Python functions a call enters; after two, all that is kept was found out."""
    for _ in range(warm_up):
        run()
    entered = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal entered
        entered += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return entered - 1  # The call of `run` itself.


def measure() -> dict[str, dict[str, list[float]]]:
    """Microseconds by what is measured and by whom, alternating; one entry a round."""
    contenders = {name: thunks(block) for name, block in blocks().items()}
    samples: dict[str, dict[str, list[float]]] = {}
    for what in next(iter(contenders.values())):
        for _ in range(ROUNDS):
            for name, calls in contenders.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    calls[what]()
                taken = (time.perf_counter() - start) / CALLS * 1e6
                samples.setdefault(what, {}).setdefault(name, []).append(taken)
    return samples


def measure_gpu_path(rounds: int, calls: int) -> dict[str, dict[str, Any]]:
    """What `stubbed_gpu.py` prints: by what is measured, "us" of each round, and "calls"."""
    file = Path(__file__).with_name("stubbed_gpu.py")
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), str(rounds), str(calls)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure, and print medians with their spread and the counts of Python calls."""
    argparse.ArgumentParser(prog="fastres bench host", description=__doc__).parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        samples = measure()
        calls = {
            name: {what: python_calls(run) for what, run in thunks(block).items()}
            for name, block in blocks().items()
        }
    finally:
        torch.set_num_threads(threads)
    table = Table("us, one thread", "eager", "fastres", "over eager", "Python calls")
    for what, by in samples.items():
        eager, fused = (statistics.median(by[name]) for name in ("eager", "fastres"))
        spread = {name: _median(samples_of) for name, samples_of in by.items()}
        counts = f"{calls['eager'][what]}, {calls['fastres'][what]}"
        table.add_row(what, spread["eager"], spread["fastres"], f"{fused / eager:.2f}x", counts)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(f"bottleneck 16-4, {'x'.join(map(str, SHAPE))}, medians of {ROUNDS} rounds")
    console.print(table)
    table = Table("us, beside the launches", "fastres on a GPU's path", "Python calls")
    for what, one in measure_gpu_path(ROUNDS, CALLS).items():
        table.add_row(what, _median(one["us"]), str(one["calls"]))
    console.print(table)
    return 0


def _median(samples: Sequence[float]) -> str:
    return f"{statistics.median(samples):.0f} ({min(samples):.0f} to {max(samples):.0f})"
