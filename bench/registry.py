"""`fastres bench kernel`: every registered implementation of a primitive, whoever registered it.

Timed are the calls that the parity harness makes (`fastres.testing.calls`), on ResNet-50's shapes,
each beside a copy of as many bytes in the same rounds. An implementation that fails the harness on
a small case is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import PRIMITIVES, Implementation, dense, implementations
from fastres.testing import BENCH_CASES, CASES, Call, Case, calls, check_implementation
from fastres.tuning.measure import Timer, gpu_timer

from .interleave import Timing, alternate
from .progress import Doing
from .results import Row, row
from .traffic import bytes_of, flops_of

#: Channels and pixels per side of the activations of ResNet-50 at 224 pixels (He et al. 2015).
SIZES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7),
         (2048, 7))  # fmt: skip

#: Batch and dtype to measure with, by device.
SCALE = {"cuda": (256, torch.bfloat16), "cpu": (16, torch.float32)}

WARM_UPS = 2

#: What a CPU's caches hold at most: overwritten before each timed call.
FLUSH_BYTES = 128 << 20

#: What is timed where nobody names one: the rest is bound by arithmetic.
MEMORY_BOUND = tuple(name for name in PRIMITIVES if not name.startswith("conv_"))

QUICK = (
    Case("quick-f32", (2, 16, 6, 5)),
    Case("quick-bf16", (2, 24, 5, 4), torch.bfloat16),
)


@dataclass(frozen=True)
class DeviceCase(Case):
    """A case whose activations are made on the device: the CPU would take minutes for them."""

    def activation(
        self, seed: str, *, shape: Sequence[int] | None = None, device: str = "cpu"
    ) -> Tensor:
        """A standard normal activation of the case's shape (or `shape`), dtype and layout."""
        n, c, h, w = shape or self.shape
        g = torch.Generator(device).manual_seed(self.generator(seed).initial_seed())
        if self.channels_last:
            t = torch.randn(n, h, w, c, dtype=self.dtype, device=device, generator=g)
            return dense(t.permute(0, 3, 1, 2), torch.channels_last)
        return torch.randn(n, c, h, w, dtype=self.dtype, device=device, generator=g)


def cases_of(
    primitive: str, device: str, quick: bool, batch: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[Case]:  # fmt: skip
    """What a primitive is timed on; `SCALE` says with which batch and dtype, if nobody does."""
    batch, dtype = batch or SCALE[device][0], dtype or SCALE[device][1]
    if primitive.startswith("conv_"):
        cases = [case for case in BENCH_CASES if case.dtype == dtype]
        if quick:
            geometry = cases[0].conv
            return [replace(case, conv=geometry) for case in QUICK]
        return [_moved(case, batch) for case in cases]
    if quick:
        return list(QUICK)
    return [
        DeviceCase(f"resnet50-{c}x{size}", (batch, c, size, size), dtype, bench=True)
        for c, size in SIZES
    ]


def _moved(case: Case, batch: int) -> DeviceCase:
    fields = {name: getattr(case, name) for name in case.__dataclass_fields__}
    return DeviceCase(**{**fields, "shape": (batch, *case.shape[1:])})


# ---------------------------------------------------------------- timing


@contextmanager
def cpu_timer() -> Iterator[Timer]:
    """Milliseconds of a call, with cold caches."""
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8)

    def milliseconds(thunk: Callable[[], object]) -> float:
        buffer.zero_()
        start = time.perf_counter()
        thunk()
        return (time.perf_counter() - start) * 1e3

    yield milliseconds


def timer_for(device: str) -> AbstractContextManager[Timer]:
    """GPU events with the L2 cache emptied between launches, or the clock."""
    return cpu_timer() if device == "cpu" else gpu_timer(torch.device(device))


def interleaved(
    contenders: dict[str, Callable[[], object]], timer: Timer, rounds: int
) -> dict[str, Timing]:
    """Every contender once per round, after warming up."""
    timed = {name: partial(timer, thunk) for name, thunk in contenders.items()}
    for milliseconds in timed.values():
        for _ in range(WARM_UPS):
            milliseconds()
    return {name: Timing.of(values) for name, values in alternate(timed, rounds).items()}


# ---------------------------------------------------------------- the run


@dataclass
class Run:
    """One run over primitives and cases: its rows, and who was left out and why.

    `batch` and `dtype` are those of `SCALE` where they are None; `doing` is told what goes on.
    """

    device: str
    quick: bool
    timer: Timer
    rounds: int
    batch: int | None
    dtype: torch.dtype | None
    doing: Doing
    rows: list[Row] = field(default_factory=list)
    declined: dict[str, list[str]] = field(default_factory=dict)
    _wrong: dict[tuple[str, ...], str | None] = field(default_factory=dict)

    def primitive(self, primitive: str, entries: Sequence[Implementation]) -> None:
        """Time every call of a primitive; all backends' implementations of it take turns."""
        backends = list(dict.fromkeys(entry.backend for entry in entries))
        for case in cases_of(primitive, self.device, self.quick, self.batch, self.dtype):
            self.doing(f"{primitive}, {case.name}")
            calls_of = [calls(primitive, case, backend, self.device) for backend in backends]
            # The same calls for each, but for the dtypes that a backend hands itself.
            for alike in zip(*calls_of, strict=True):
                # One in place changes what the next round is given.
                if alike[0].in_place is None:
                    self._calls(case, dict(zip(backends, alike, strict=True)), entries)

    def _calls(
        self, case: Case, by_backend: dict[str, Call], entries: Sequence[Implementation]
    ) -> None:
        able = [e for e in entries if self._able(e, by_backend[e.backend], case)]
        if not able:
            return
        thunks = {str(entry): _thunk(entry, by_backend[entry.backend]) for entry in able}
        moved = {
            str(entry): bytes_of(entry.primitive, by_backend[entry.backend], thunks[str(entry)]())
            for entry in able
        }
        source = torch.empty(max(moved.values()) // 2 + 1, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        contenders = {**thunks, "copy": lambda: target.copy_(source)}
        timings = interleaved(contenders, self.timer, self.rounds)
        for entry in able:
            # The bound: what a copy of as many bytes takes.
            copy = timings["copy"].median * moved[str(entry)] / (2 * source.numel())
            call = by_backend[entry.backend]
            self.rows.append(_row(
                entry, call, case, timings[str(entry)], rounds=self.rounds, device=self.device,
                bytes=moved[str(entry)], bound_ms=copy,
            ))  # fmt: skip

    def _able(self, entry: Implementation, call: Call, case: Case) -> bool:
        """Whether an implementation takes a call and is right on small ones like it."""
        reason = entry.why_not(call.request)
        if reason is not None:
            reasons = self.declined.setdefault(f"{entry.primitive} {entry}", [])
            reasons += [] if reason in reasons else [reason]
            return False
        key = entry.primitive, str(entry), str(case.dtype), _layout(case)
        if key not in self._wrong:
            self._wrong[key] = wrong = why_wrong(entry, case, self.device)
            if wrong is not None:
                self.rows.append(_named(entry, case, device=self.device, parity=f"failed: {wrong}"))
        return self._wrong[key] is None


def _layout(case: Case) -> str:
    return "nhwc" if case.channels_last else "nchw"


def _thunk(entry: Implementation, call: Call) -> Callable[[], object]:
    return lambda: entry.run(*call.args, **call.kwargs)


def _row(entry: Implementation, call: Call, case: Case, timing: Timing, **values: Any) -> Row:
    """What a call took."""
    shape = "x".join(map(str, case.shape))
    subject = ", ".join(filter(None, (entry.primitive, call.label, shape)))
    return _named(
        entry, case, subject, ms=round(timing.median, 5), low=round(timing.low, 5),
        high=round(timing.high, 5), size=case.shape[2], parity="ok",
        flops=flops_of(entry.primitive, call, case) or None,
        note="the bound is a copy of as many bytes", **values,
    )  # fmt: skip


def _named(entry: Implementation, case: Case, subject: str = "", **values: Any) -> Row:
    """A row of an implementation; the subject is its primitive where nothing was timed."""
    return row(
        "kernel", subject or entry.primitive, str(entry), backend=entry.backend,
        dtype=str(case.dtype).removeprefix("torch."), layout=_layout(case), **values,
    )  # fmt: skip


def why_wrong(entry: Implementation, like: Case, device: str) -> str | None:
    """What is wrong with an implementation on small cases of that dtype and layout, or None."""
    kind = (like.dtype, like.channels_last, "normal")
    small = [c for c in CASES if (c.dtype, c.channels_last, c.values) == kind and c.conv][:2]
    try:
        for case in small:
            check_implementation(entry, case, device=device)
    except Exception as error:  # one that crashes is as wrong as one that is off
        return f"{type(error).__name__}: {error}"
    return None


def entries_of(primitive: str, backend: str | None) -> list[Implementation]:
    """Who is timed; the truth, which nobody runs for its speed, only where it is asked for."""
    entries = implementations(primitive, backend)
    return [entry for entry in entries if backend or entry.backend != "reference"]
