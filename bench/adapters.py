"""Single kernels and convolutions as rows: `bench.registry` and `bench.convolutions` measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastres.backends import BACKENDS
from fastres.cli.errors import CommandError
from fastres.primitives import PRIMITIVES

from . import convolutions, registry
from .results import Row, row

Say = Callable[[str], None]


def kernel_rows(options: Any, say: Say) -> Iterator[Row]:
    """A row for every registered implementation, call and shape.

    Args:
        options: device, quick, rounds, batch_size, dtype (each None for its default), backend and
            primitive.
        say: is told what goes on.
    """
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    chosen = [options.primitive] if options.primitive else [
        name for name in PRIMITIVES if not name.startswith("conv_")
    ]  # fmt: skip
    with registry.timer_for(options.device) as timer:
        run = registry.Run(
            options.device, options.quick, timer, options.rounds, options.batch_size, dtype, say
        )
        for primitive in chosen:
            done = len(run.rows)
            backend = None if options.backend == "auto" else options.backend
            run.primitive(primitive, registry.entries_of(primitive, backend))
            yield from (_kernel(found, options.device, run) for found in run.rows[done:])
    for what, reasons in run.declined.items():
        say(f"declined: {what}: {'; '.join(reasons)}")
    for what, wrong in run.refused.items():
        primitive, implementation, kind, layout = what.split()
        yield row(
            "kernel", primitive, implementation, dtype=kind.removeprefix("torch."), layout=layout,
            device=options.device, parity=f"failed: {wrong}",
        )  # fmt: skip


def _kernel(found: dict[str, Any], device: str, run: registry.Run) -> Row:
    size = int(found["shape"].split("x")[2])
    parts = (found["primitive"], found["variant"], found["shape"])
    return row(
        "kernel", ", ".join(filter(None, parts)), found["implementation"],
        backend=found["implementation"].partition(":")[0], device=device, size=size,
        rounds=run.rounds or (registry.QUICK_ROUNDS if run.quick else registry.ROUNDS),
        bound_ms=found["ms"] * found["share_of_copy"], flops=found.get("flops"), parity="ok",
        note="the bound is a copy of as many bytes",
        **{k: found[k] for k in ("ms", "low", "high", "bytes", "dtype", "layout")},
    )  # fmt: skip


def conv_rows(options: Any, say: Say) -> Iterator[Row]:
    """A row for every way to a convolution of ResNet-50, forward and backward.

    Raises:
        CommandError: where nothing can be measured.
    """
    device = options.device
    reason = BACKENDS["triton"].why_not()
    if reason is None and device == "cpu" and not options.quick:
        reason = "there is no GPU that torch can use"
    if reason is not None:
        raise CommandError(f"conv must have a GPU and triton: {reason}")
    if wrong := convolutions.why_wrong_on(device):
        yield row("conv", "parity", "triton", device=device, parity=f"failed: {wrong}")
        return
    shapes = convolutions.QUICK if options.quick else convolutions.SHAPES
    for found in convolutions.rows(shapes, device, options.rounds):
        say(f"{found['shape']} {found['direction']} {found['contender']} {found['ms']} ms")
        yield row(
            "conv", f"{found['shape']}, batch {found['batch']}, {found['direction']}",
            found["contender"], size=found["size"], dtype="bfloat16", layout="nhwc",
            device=device, rounds=options.rounds, flops=found["flops"], parity="ok",
            **{k: found[k] for k in ("ms", "low", "high")},
        )  # fmt: skip
