"""The update of a block's running statistics: in one pass, as one operator where it is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.block.layers import Layer
from fastres.block.library import _library
from fastres.block.settings import current
from fastres.kernels import (
    Request,
    RunningUpdate,
    load_extensions,
    preference,
    reference,
    registrations,
    select,
)

Run = Callable[[Sequence[RunningUpdate]], None]

#: Of an update's fields these are tensors, the counter the last of them.
_TENSORS = 4
_COUNTER = 3

#: (device, dtype) of a tensor.
Kind = tuple[torch.device, torch.dtype]


class Updates(NamedTuple):
    """What a block's batches do to the running statistics of its layers.

    Attributes:
        layers: the block's units with their tensors.
        counts: values per channel of each unit's output.
        backend: whose kernels update.
        buffers: running means, variances and counters that change.
    """

    layers: Sequence[Layer]
    counts: Sequence[int]
    backend: str
    buffers: list[Tensor]

    @classmethod
    def of(cls, layers: Sequence[Layer], counts: Sequence[int], backend: str) -> Updates | None:
        """None where no layer trains."""
        training = [layer for layer in layers if layer.training]
        if not training:
            return None
        buffers = [
            t
            for layer in training
            for t in (layer.running_mean, layer.running_var, layer.counter)
            if t is not None
        ]
        return cls(layers, counts, backend, buffers)

    def after(self, stats: Sequence[Tensor]) -> list[RunningUpdate]:
        """The updates by the statistics [5, K] of each unit that has a norm."""
        updates, known = [], iter(stats)
        for layer, count in zip(self.layers, self.counts, strict=True):
            if layer.unit.norm is None:
                continue
            batch = next(known)
            if layer.training:
                mean, var = layer.running_mean, layer.running_var
                if mean is None or var is None:
                    mean = var = None
                updates.append(
                    RunningUpdate(batch, mean, var, layer.counter, layer.momentum, count)
                )
        return updates

    def __call__(self, stats: Sequence[Tensor]) -> None:
        """Take the batches in."""
        update_running(self.after(stats), self.backend)


def update_running(updates: Sequence[RunningUpdate], backend: str | None = None) -> None:
    """Take batches into running statistics in place, as nn.BatchNorm2d does, one after another.

    counter += 1; running = (1 - momentum)*running + momentum*batch, with the unbiased variance. A
    norm may be there several times. No autograd; on a GPU nothing waits.

    Args:
        updates: what `fastres.kernels.RunningUpdate` says, on one device each with all its tensors.
        backend: whose kernels update; the one in force by default.

    Raises:
        ValueError: for a wrong shape, before anything is written.
    """
    if not updates:
        return
    backend = current().backend if backend is None else backend
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if traced and not _on_device(updates):
        _dispatch(updates, backend)
    else:
        update_now(updates, backend)


def _on_device(updates: Sequence[RunningUpdate]) -> bool:
    """Whether a momentum is a tensor, which only the formulas take."""
    return any([isinstance(u.momentum, Tensor) for u in updates])


def update_now(updates: Sequence[RunningUpdate], backend: str) -> None:
    """The same without an operator, where nobody traces or where a kernel is only written down."""
    if _on_device(updates):
        reference.update_running(updates)
        return
    kinds = [
        None if t is None else (t.device, t.dtype)
        for stats, mean, var, counter, _, _ in updates
        for t in (stats, mean, var, counter)
    ]
    _choose(backend, registrations(), tuple(kinds))(updates)


@lru_cache(maxsize=1024)
def _choose(backend: str, registered: int, kinds: tuple[Kind | None, ...]) -> Run:
    """The implementation for tensors of these kinds; `registered` makes it anew for a new kernel.

    Kernels take what lies on one device, and counters in int64; a formula takes anything.
    """
    there = [(i % _TENSORS, *kind) for i, kind in enumerate(kinds) if kind is not None]
    devices = {device for _, device, _ in there}
    counters = {dtype for place, _, dtype in there if place == _COUNTER}
    if len(devices) == 1 and counters <= {torch.int64}:
        (device,) = devices
        load_extensions()
        dtypes = dict.fromkeys(dtype for place, _, dtype in there if place != _COUNTER)
        first, *more = (Request(device.type, dtype, False) for dtype in dtypes)
        found, _ = select("update_running", preference(backend, device.type), first, *more)
        if found is not None:
            return found.run
    return reference.update_running


# ---------------------------------------------------------------- the operator


# Nothing is returned: functionalisation refuses lists that are mutated beside tensors returned.
_library.define(
    "update_running(Tensor[] stats, Tensor(a!)[] running, Tensor(b!)[] counters, bool[] given, "
    "float?[] momenta, SymInt[] counts, str backend) -> ()"
)


def _dispatch(updates: Sequence[RunningUpdate], backend: str) -> None:
    """Lists hold what is there; `given` says which of mean, variance and counter an update has."""
    buffers = [(u.running_mean, u.running_var, u.counter) for u in updates]
    torch.ops.fastres.update_running(
        [u.stats for u in updates],
        [t for mean, var, _ in buffers for t in (mean, var) if t is not None],
        [counter for _, _, counter in buffers if counter is not None],
        [t is not None for three in buffers for t in three],
        [u.momentum for u in updates],
        [u.count for u in updates],
        backend,
    )


@torch.library.impl(_library, "update_running", "CompositeExplicitAutograd")
def _update_running(
    stats: Sequence[Tensor],
    running: Sequence[Tensor],
    counters: Sequence[Tensor],
    given: Sequence[bool],
    momenta: Sequence[float | None],
    counts: Sequence[int],
    backend: str,
) -> None:
    vectors, scalars = iter(running), iter(counters)

    def updates() -> Iterator[RunningUpdate]:
        for i, (one, momentum, count) in enumerate(zip(stats, momenta, counts, strict=True)):
            mean, var, counter = given[3 * i : 3 * i + 3]
            yield RunningUpdate(
                one,
                next(vectors) if mean else None,
                next(vectors) if var else None,
                next(scalars) if counter else None,
                momentum,
                count,
            )

    update_now(list(updates()), backend)


@torch.library.register_fake("fastres::update_running", lib=_library)
def _update_running_fake(
    stats: Sequence[Tensor],
    running: Sequence[Tensor],
    counters: Sequence[Tensor],
    given: Sequence[bool],
    momenta: Sequence[float | None],
    counts: Sequence[int],
    backend: str,
) -> None:
    return None
