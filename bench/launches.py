"""`python -m bench launches`: what a launch costs on the host, bound once or through Triton's JIT.

Without a GPU a driver that does nothing stands in: what is measured then is Python's part alone,
which is the part that binding saves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from fastres.kernels import Conv, Prologue
from fastres.kernels.triton import launch

ROUNDS, CALLS = 21, 500


class NoDriver:
    """Triton's driver for a Hopper GPU, as far as a launch asks it: nothing is loaded or runs."""

    class utils:  # noqa: N801  (the driver's own name)
        @staticmethod
        def load_binary(*_: object) -> tuple[int, ...]:
            return 1, 1, 64, 0, 1024

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 227 << 10}

    class launcher_cls:  # noqa: N801
        def __init__(self, *_: object) -> None:
            """Nothing to prepare."""

        def __call__(self, *_: object) -> None:
            """Nothing to launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _calls() -> tuple[Callable[[], object], Callable[[], object]]:
    """(through the JIT, bound) launches of a 1x1 convolution with prologue and statistics."""
    from fastres.kernels.triton import convolution

    device = "cuda" if torch.cuda.is_available() else "cpu"
    captured: list[tuple[Any, ...]] = []
    real = convolution.launch
    convolution.launch = lambda *given, **more: captured.append((given, more))
    try:
        x = torch.randn(2, 64, 8, 8, device=device, dtype=torch.bfloat16)
        weight = torch.randn(64, 64, 1, 1, device=device, dtype=torch.bfloat16)
        stats = torch.ones(5, 64, device=device)
        convolution.conv_forward(
            x.contiguous(memory_format=torch.channels_last), weight, None, Conv(),
            prologue=Prologue(stats, "relu"), want_state=True,
        )  # fmt: skip
    finally:
        convolution.launch = real
    (kernel, grid, tensors, sizes, constants), options = captured[0]

    def jit() -> object:
        return kernel[grid](
            *tensors, *sizes, **constants, **options, **launch.options_of(launch.MAX_REGISTERS)
        )

    def bound() -> object:
        return launch._launch_bound(
            kernel,
            grid,
            tensors,
            sizes,
            constants,
            *options.values(),
            launch.MAX_REGISTERS,
            tensors[0].device,
        )

    return jit, bound


def _microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main(arguments: Sequence[str]) -> int:
    """Measure both kinds of launch, alternating, and print their medians."""
    argparse.ArgumentParser(prog="python -m bench launches", description=__doc__).parse_args(
        arguments
    )
    from triton.runtime import driver

    if not torch.cuda.is_available():
        driver.set_active(NoDriver())
    calls = dict(zip(("Triton's JIT", "bound"), _calls(), strict=True))
    for call in calls.values():
        call()
    samples = {name: [] for name in calls}  # type: dict[str, list[float]]
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(_microseconds(call))
    where = "on a GPU" if torch.cuda.is_available() else "without a GPU: Python's part alone"
    console = Console()
    console.print(f"microseconds per launch, medians of {ROUNDS} rounds, {where}")
    for name, values in samples.items():
        low, high = min(values), max(values)
        console.print(f"  {name:14} {statistics.median(values):6.1f}  ({low:.1f} to {high:.1f})")
    return 0
