"""Launch shapes that the autotuner chose, kept by all that it was asked: every launch asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from fastres import tuning
from fastres.kernels.tape import untaped

T = TypeVar("T")

#: Sizes of a model are few; a service that sees ever new ones starts over now and then.
_MOST_KEPT = 16384
_chosen: dict[tuple[Any, ...], Any] = {}


def tuned(
    name: str,
    source: str,
    sizes: tuple[int | str | bool, ...],
    candidates: Sequence[T],
    run: Callable[[T], object],
    device: torch.device,
    prepare: tuning.Prepare | None = None,
) -> T:
    """The autotuner's choice among several ways to launch the same thing.

    Args:
        name: of what is launched.
        source: identifies the kernels' text or binary.
        sizes: what the choice depends on, apart from device and source.
        candidates: the heuristic's first.
        run: computes into fresh memory with one candidate, so that tuning changes nothing.
        device: where it is to run.
        prepare: as for `tuning.choose`.
    """
    if len(candidates) == 1:
        return candidates[0]
    key = (name, source, sizes, device.index, torch.are_deterministic_algorithms_enabled())
    found: T | None = _chosen.get(key)
    if found is None:
        problem = tuning.Problem(name, sizes, source)
        with untaped():
            found = tuning.choose(
                problem, candidates, lambda c: lambda: run(c), device=device, prepare=prepare
            )
        # What stands in while a graph is captured is not the last word.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            if len(_chosen) >= _MOST_KEPT:
                _chosen.clear()
            _chosen[key] = found
    return found
