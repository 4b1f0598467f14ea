"""`fastres bench convolutions`: Triton's fused convolutions beside cuDNN's and separate passes.

ResNet-50's convolutions at batch 256 in bfloat16, forward and backward, each against
the unfused way to the same results; contenders alternate, medians. --quick runs two tiny shapes,
in Triton's interpreter where there is no GPU: a smoke test, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import (
    BACKENDS,
    Branch,
    Conv,
    Gate,
    PendingGrad,
    Prologue,
    aten,
    implementations,
)
from fastres.kernels.triton import batch_norm, convolution, convolution_backward
from fastres.testing import CASES

from .conditions import ROOT, conditions, stamp
from .registry import interleaved, timer_for, why_wrong
from .shapes import CONVOLUTIONS, ConvShape

Step = Callable[[], object]

BATCH = 256
ROUNDS, QUICK_ROUNDS = 25, 2
QUICK = (ConvShape(32, 64, 4, batch=2), ConvShape(32, 32, 4, 3, 2, batch=2))


class Tensors:
    """A convolution's tensors, random; the input raw, with its normalisation pending."""

    def __init__(self, shape: ConvShape, device: str) -> None:
        self.conv = Conv((shape.stride,) * 2, (shape.kernel // 2,) * 2)
        h, w = self.conv.output_size((shape.size,) * 2, (shape.kernel,) * 2)
        self.x = self._random((shape.batch, shape.channels, shape.size, shape.size), device)
        self.weight = self._random(
            (shape.outputs, shape.channels, shape.kernel, shape.kernel), device
        )
        self.y = self._random((shape.batch, shape.outputs, h, w), device)
        self.grad = torch.randn_like(self.y)
        self.flops = 2 * self.y.numel() * self.weight[0].numel()
        self.prologue = Prologue(_stats(self.x), "relu")
        self.branch = Branch(self.y, _stats(self.y))
        self.gate = Gate("affine", None, "relu")
        sums = torch.randn(3, shape.outputs, device=device)
        count = shape.batch * h * w
        self.pending = PendingGrad(self.grad, self.gate, self.branch, sums, count)

    @staticmethod
    def _random(shape: tuple[int, ...], device: str) -> Tensor:
        t = torch.randn(shape, device=device, dtype=torch.bfloat16)
        return t.contiguous(memory_format=torch.channels_last)


def _stats(y: Tensor) -> Tensor:
    state = batch_norm.channel_stats(y)
    count = y.numel() // y.shape[1]
    return batch_norm.finalize_stats(state, count, None, None, None, 1e-5, acc=torch.float32)


def forward_steps(t: Tensors) -> dict[str, Step]:
    """Ways to a convolution's output and its statistics, and the bare convolution."""

    def normalised() -> Tensor:
        return batch_norm.scale_shift_act(t.x, t.prologue.stats, act="relu")[0]

    def separate(x: Tensor) -> object:
        return batch_norm.channel_stats(aten.conv_forward(x, t.weight, None, t.conv)[0])

    return {
        "cuDNN alone": lambda: aten.conv_forward(t.x, t.weight, None, t.conv),
        "cuDNN, then statistics": lambda: separate(t.x),
        "fused statistics": lambda: convolution.conv_forward(
            t.x, t.weight, None, t.conv, want_state=True
        ),
        "normalise, cuDNN, statistics": lambda: separate(normalised()),
        "fused prologue and statistics": lambda: convolution.conv_forward(
            t.x, t.weight, None, t.conv, prologue=t.prologue, want_state=True
        ),
    }


def backward_steps(t: Tensors) -> dict[str, Step]:
    """Ways from a gradient to those of input and weight, and the sums of the norm below."""
    below = (t.gate, Branch(t.x, t.prologue.stats))
    wanted: dict[str, Any] = {
        "prologue": t.prologue, "want_x": True, "want_weight": True, "accumulate": None,
        "reduce": below,
    }  # fmt: skip

    def separate() -> object:
        (grad_y,), _ = batch_norm.bn_act_backward_apply(
            t.grad, t.gate, (t.branch,), t.pending.sums, t.pending.values, want_grads=(True,)
        )
        assert grad_y is not None
        z, _ = batch_norm.scale_shift_act(t.x, t.prologue.stats, act="relu")
        grad_weight = aten.conv_backward_weight(grad_y, z, t.weight, t.conv)
        grad_x = aten.conv_backward_data(grad_y, t.weight, t.x, t.conv)
        return grad_weight, batch_norm.bn_act_backward_reduce(grad_x, *_single(below))

    def bare() -> object:
        return (
            aten.conv_backward_weight(t.grad, t.x, t.weight, t.conv),
            aten.conv_backward_data(t.grad, t.weight, t.x, t.conv),
        )

    run = {
        "c'": convolution_backward.conv_backward_formed,
        "c": convolution_backward.conv_backward_pending,
    }
    return {
        "cuDNN alone": bare,
        "separate passes, cuDNN": separate,
        **{
            f"fused, level {level}": lambda f=f: f(t.pending, t.x, t.weight, t.conv, **wanted)
            for level, f in run.items()
        },
    }


def _single(below: tuple[Gate, Branch]) -> tuple[Gate, tuple[Branch]]:
    return below[0], (below[1],)


def rows(shapes: Sequence[ConvShape], device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per shape, direction and contender."""
    torch.backends.cudnn.benchmark = True  # cuDNN's fastest
    with timer_for(device) as timer:
        for shape in shapes:
            tensors = Tensors(shape, device)
            for direction, steps in (("forward", forward_steps), ("backward", backward_steps)):
                timings = interleaved(steps(tensors), timer, rounds)
                for name, timing in timings.items():
                    products = 2 if direction == "backward" else 1
                    yield {
                        "shape": shape.name, "batch": shape.batch, "direction": direction,
                        "size": shape.size, "flops": products * tensors.flops,
                        "contender": name, "ms": round(timing.median, 5),
                        "low": round(timing.low, 5), "high": round(timing.high, 5),
                        "over_cudnn": round(timing.median / timings["cuDNN alone"].median, 3),
                    }  # fmt: skip


def why_wrong_on(device: str) -> str | None:
    """What fails the parity harness in bfloat16, channels_last; nothing is timed then."""
    like = next(c for c in CASES if c.dtype == torch.bfloat16 and c.channels_last)
    for primitive in ("conv_forward", "conv_backward", "channel_stats", "scale_shift_act"):
        for entry in implementations(primitive, "triton"):
            if (reason := why_wrong(entry, like, device)) is not None:
                return f"{entry} {primitive}: {reason}"
    return None


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and keep the result; 1 where nothing can run."""
    parser = argparse.ArgumentParser(
        prog="fastres bench convolutions", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a smoke test, not a measurement")
    quick = parser.parse_args(arguments).quick
    reason = BACKENDS["triton"].why_not()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason is not None or (device == "cpu" and not quick):
        print(f"nothing can be measured here: {reason or 'there is no GPU that torch can use'}")
        return 1
    if wrong := why_wrong_on(device):
        print(f"refused: {wrong}")
        return 1
    shapes = QUICK if quick else [replace(s, batch=BATCH) for s in CONVOLUTIONS.values()]
    kept: list[dict[str, Any]] = []
    try:
        for row in rows(shapes, device, QUICK_ROUNDS if quick else ROUNDS):
            kept.append(row)
            print(
                f"{row['shape']:<34} {row['direction']:<9} {row['contender']:<30} "
                f"{row['ms']:>9.4f} ms  {row['over_cudnn']:>6.2f} of cuDNN alone",
                flush=True,
            )
    finally:  # also after Ctrl-C
        if kept and not quick:
            _write({**conditions(device), "rows": kept})
    if quick:
        print("quick: a smoke test and not a measurement; nothing is written")
    return 0


def _write(found: dict[str, Any]) -> None:
    path = ROOT / "results" / f"{stamp(found)}-convolutions.json"
    with path.open("x") as file:
        file.write(json.dumps(found, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT.parent)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
