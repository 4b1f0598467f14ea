"""One step of a contender: how it is made, warmed up and timed, and what memory it takes.

A network's training step is forward, loss, backward and SGD; a part's is forward and the
gradients of its input and parameters. Inference is the forward pass without gradients.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres.testing import saved_bytes

from .contenders import Job

#: Batches that take turns, so that no step finds its input in a cache.
ROTATED = {"cpu": 2, "cuda": 3}

#: Steady: the last three times lie within a tenth of each other; after ten it is as it is.
STEADY_TIMES, STEADY_SPREAD, MOST_WARM_UPS = 3, 0.10, 10

#: He et al. 2015, section 3.4; a small rate, as random labels teach nothing.
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4

#: What allocators say that have no class of their own for it.
NO_MEMORY = ("can't allocate", "not enough memory", "out of memory", "cannot allocate")

Run = Callable[[Tensor], object]


# ---------------------------------------------------------------- steps


def training(job: Job, module: nn.Module, x: Tensor) -> Run:
    """A training step on a batch like `x`."""
    with torch.no_grad(), job.autocast():
        out = logits(module.forward(x))  # which nobody compiles: only the shape is asked for
    if job.subject.part:
        grad, wanted = torch.randn_like(out), [p for p in module.parameters() if p.requires_grad]

        def gradients(x: Tensor) -> object:
            x = x.detach().requires_grad_()
            with job.autocast():
                out = module(x)
            return torch.autograd.grad(out, [x, *wanted], grad)

        return gradients
    target = torch.randint(out.shape[1], (len(x),), device=x.device)
    optimizer = torch.optim.SGD(
        module.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY
    )

    def step(x: Tensor) -> object:
        optimizer.zero_grad(set_to_none=True)
        with job.autocast():
            loss = F.cross_entropy(logits(module(x)), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


def inference(job: Job, module: nn.Module, x: Tensor) -> Run:
    """A forward pass without gradients."""

    def step(x: Tensor) -> object:
        with torch.no_grad(), job.autocast():
            return module(x)

    return step


def convolutions(job: Job, module: nn.Module, x: Tensor) -> Run:
    """A part's convolutions alone, on inputs of the right shapes, forward and backward."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.update({m: args[0].detach()}))
        for m in convs
    ]
    module(x)
    for hook in hooks:
        hook.remove()
    training = job.mode == "train"
    inputs = [(m, seen[m].clone().requires_grad_(training)) for m in convs]
    with torch.no_grad(), job.autocast():
        grads = [torch.randn_like(m(x)) for m, x in inputs]

    def step(_: Tensor) -> object:
        with torch.set_grad_enabled(training), job.autocast():
            outputs = [m(x) for m, x in inputs]
        return training and [
            torch.autograd.grad(y, [x, m.weight], g)
            for y, (m, x), g in zip(outputs, inputs, grads, strict=True)
        ]

    return step


def step_of(job: Job, module: nn.Module, x: Tensor) -> Run:
    """The step that a job stands for."""
    if job.who.bare:
        return convolutions(job, module, x)
    return (training if job.mode == "train" else inference)(job, module, x)


def logits(out: Any) -> Tensor:
    """The first result of a network, which may return more in training."""
    if not isinstance(out, Tensor):
        out = out.logits if hasattr(out, "logits") else out[0]
    output: Tensor = out
    return output


# ---------------------------------------------------------------- a measured contender


class Clock:
    """Milliseconds of a call: by the clock, or between two events on a GPU's stream."""

    def __init__(self, device: str) -> None:
        self._gpu = device == "cuda"
        if self._gpu:
            torch.backends.cudnn.benchmark = True  # everybody gets cuDNN's fastest

    def milliseconds(self, thunk: Callable[[], object]) -> float:
        """Call once."""
        if not self._gpu:
            begin = time.perf_counter()
            thunk()
            return (time.perf_counter() - begin) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        thunk()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


@dataclass
class Facts:
    """What is known of a contender before its rounds.

    Attributes:
        warm_ups: steps that did not count.
        peak_bytes: the most memory that the module and its steps took, None if unknown.
        saved_bytes: what a forward pass keeps for its backward, None if unknown.
        level: of fusion, of fastres.
        note: what a reader of the times has to know.
    """

    warm_ups: int
    peak_bytes: int | None
    saved_bytes: int | None
    level: str | None
    note: str | None


class Measured:
    """A contender's step on the device, with its inputs, ready to be timed again and again."""

    def __init__(self, job: Job) -> None:
        self.job = job
        job.subject.import_library()
        meter, self._clock = Meter(job.device), Clock(job.device)
        module = job.module()
        batches = [job.place(job.subject.input(seed)) for seed in range(ROTATED[job.device])]
        self.run = step_of(job, module, batches[0])
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs = cycle(batches)
        self.run(next(self._inputs))
        meter.reset()
        self.run(next(self._inputs))
        peak, saved = meter.peak(), _saved(job, module, batches[0])
        level, *notes = _fusion(module) if job.who.fused else (None,)
        if job.device == "cpu" and job.who.compiled is not None:
            notes.append("its peak has the compiler in it")
        if job.device == "cuda":
            notes.append(self._capture(batches[0]))
        note = "; ".join(filter(None, notes)) or None
        self.facts = Facts(self._warm_up(), peak, saved, level, note)

    def milliseconds(self) -> float:
        """One step on the next batch."""
        x = next(self._inputs)
        if self._graph is None:
            return self._clock.milliseconds(partial(self.run, x))
        self._static.copy_(x)
        return self._clock.milliseconds(self._graph.replay)

    def _warm_up(self) -> int:
        times: list[float] = []
        while len(times) < MOST_WARM_UPS and not steady(times):
            times.append(self.milliseconds())
        return len(times)

    def _capture(self, x: Tensor) -> str | None:
        """Record the step as a CUDA graph; why that was not possible, or None."""
        self._static = x.clone()
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        try:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # what a first step allocates must be there before capture
                    self.run(self._static)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                self.run(self._static)
        except Exception as error:  # whatever a library does that capture forbids
            if out_of_memory(error):
                raise
            torch.cuda.synchronize()
            return f"no CUDA graph: {first_line(error)}"
        self._graph = graph
        return None


def _fusion(module: nn.Module) -> tuple[str | None, str | None]:
    """The level at which a module's blocks run fused, and what to say where not all of them do."""
    rows = fastres.explain(module).rows
    fused = [row for row in rows if row.fused]
    levels = dict.fromkeys(row.level for row in fused)
    note = f"{len(fused)} of {len(rows)} blocks fused" if len(fused) < len(rows) else None
    return " and ".join(map(str, levels)) or None, note


def steady(times: list[float]) -> bool:
    """Whether the last times lie within `STEADY_SPREAD` of each other."""
    last = times[-STEADY_TIMES:]
    return len(last) == STEADY_TIMES and max(last) <= (1 + STEADY_SPREAD) * min(last)


def out_of_memory(error: Exception) -> bool:
    """Whether an error is one of the many ways of saying that there was no room."""
    said = str(error).lower()
    plain = isinstance(error, RuntimeError) and any(words in said for words in NO_MEMORY)
    return plain or isinstance(error, torch.OutOfMemoryError | MemoryError)


def first_line(error: BaseException) -> str:
    """An error's first line of text, or its kind where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _saved(job: Job, module: nn.Module, x: Tensor) -> int | None:
    if job.mode != "train" or job.who.bare:
        return None

    def forward() -> object:
        with job.autocast():
            return module(x.detach().requires_grad_(job.subject.part))

    # A compiled graph may refuse the hooks that count.
    try:
        return saved_bytes(module, forward)
    except Exception:
        if job.who.compiled is None:
            raise
        return None


# ---------------------------------------------------------------- memory


class Meter:
    """Peak memory since it was made: of the GPU's allocator, or resident of this process."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._start = torch.cuda.memory_allocated() if device == "cuda" else _resident("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far: compiling and choosing algorithms take memory once."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts anew
        except OSError:
            return  # then it is the peak of all since the process began

    def peak(self) -> int | None:
        """Bytes above where it began."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - (self._start or 0)
        peak = _resident("VmHWM")
        return None if peak is None or self._start is None else peak - self._start


def _resident(field: str) -> int | None:
    """A field of /proc/self/status in bytes; elsewhere the peak that getrusage knows."""
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(rf"{field}:\s*(\d+) kB", status.read_text())
        return int(match[1]) * 1024 if match else None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


# ---------------------------------------------------------------- what the machine can do


#: Bytes that are copied, the side of the matrices that are multiplied, and the images [N, C, H, W]
#: that are convolved with 3x3.
COPIED, SIDE = {"cpu": 64 << 20, "cuda": 1 << 30}, {"cpu": 1024, "cuda": 8192}
IMAGES = {"cpu": (8, 256, 14, 14), "cuda": (256, 512, 28, 28)}
ROOF_ROUNDS = 7


def roof(device: str, dtype: str) -> dict[str, float]:
    """Bandwidth of a copy (GB/s, read and written), and the speed (TFLOP/s) of a matrix product or
    a convolution, whichever library does better; of several calls the fastest, for it is a bound.
    """
    n, kind, clock = SIDE[device], getattr(torch, dtype), Clock(device)
    # A network's float32 is cuDNN's: where that may be TF32, so may the product.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    source = torch.randint(255, (COPIED[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    shape = IMAGES[device]
    images, weight = (
        torch.randn(s, device=device).to(kind).contiguous(memory_format=torch.channels_last)
        for s in (shape, (shape[1], shape[1], 3, 3))
    )
    speeds = (
        2 * n**3 / _fastest(clock, lambda: a @ b),
        2 * images.numel() * weight[0].numel()
        / _fastest(clock, lambda: F.conv2d(images, weight, padding=1)),
    )  # fmt: skip
    copy = _fastest(clock, lambda: target.copy_(source))
    return {
        "bandwidth_gb_s": 2 * source.numel() / copy / 1e6,
        "peak_tflop_s": max(speeds) / 1e9,
    }


def _fastest(clock: Clock, call: Callable[[], object]) -> float:
    """Milliseconds of a call."""
    return min([clock.milliseconds(call) for _ in range(2 + ROOF_ROUNDS)][2:])
