"""Choosing: who may measure, what is known already, and what is taken where nothing is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import TypeVar

import torch

from fastres.tuning import measure
from fastres.tuning.machine import cache_file, forget_machines, gpu_index, machine_of
from fastres.tuning.store import Choice, Problem, forget_stores, lock, store_of, table_of

T = TypeVar("T")

_log = logging.getLogger("fastres.tuning")

#: What was chosen in this process, by GPU and problem: the candidate's name, and where it stood.
_memory: dict[tuple[int, Problem], tuple[str, int]] = {}


@cache
def _autotune() -> bool:
    """FASTRES_AUTOTUNE, looked at once, when something is first chosen."""
    value = os.environ.get("FASTRES_AUTOTUNE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"FASTRES_AUTOTUNE must be 0 or 1, got {value!r}")
    return value == "1"


def _why_fixed(device: torch.device) -> str | None:
    """Why a choice must depend on nothing but the release, or None."""
    if not _autotune():
        return "FASTRES_AUTOTUNE=0"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on"
    if device.type != "cuda":
        return f"only GPUs are measured, and the device is {device.type}"
    return None


def why_not_measure(device: torch.device) -> str | None:
    """Why nothing may be measured on a device now, or None where it may.

    Raises:
        ValueError: for a wrong value of FASTRES_AUTOTUNE.
    """
    if (reason := _why_fixed(device)) is not None:
        return reason
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def choose(
    problem: Problem,
    candidates: Sequence[T],
    run: Callable[[T], measure.Thunk],
    *,
    device: torch.device,
    name: Callable[[T], str] = str,
    prepare: measure.Prepare | None = None,
) -> T:
    """The fastest of several variants of the same computation on a device.

    What is known is taken: from this process, the file of the machine (`cache_file`), the table
    that ships for the device. Otherwise the candidates are measured, which waits for the GPU and
    needs memory for an L2-sized buffer, and the answer is kept in the file.

    Where measuring is out of the question (`why_not_measure`) the first candidate stands in for
    what is not known. With FASTRES_AUTOTUNE=0, under torch.use_deterministic_algorithms and on a
    CPU, only the shipped table is looked at, so that a choice depends on nothing but the release.

    In distributed runs every rank measures for itself, so ranks may choose differently, and
    differ in rounding, where their GPUs differ in speed. FASTRES_AUTOTUNE=0 makes them equal.

    Args:
        problem: what the choice depends on.
        candidates: the variants; the first is the documented heuristic's. They differ in speed
            alone.
        run: prepares a candidate (it may compile; this is not timed) and returns a function that
            launches it once on the current stream and changes nothing but memory of its own. One
            that raises takes its candidate out of the comparison.
        device: where it runs.
        name: the name under which a candidate is kept. A kept name that no candidate has any more
            is ignored.
        prepare: given what launches the candidates before the first is launched: say, to compile
            them side by side.

    Returns:
        One of the candidates; the first where all fail.

    Raises:
        ValueError: for no candidates, names that are not different, or a wrong FASTRES_AUTOTUNE.
        TypeError: for sizes of another type than int, str or bool.
    """
    if not candidates:
        raise ValueError("candidates must hold at least one candidate, got none")
    if len(candidates) == 1:
        return candidates[0]
    if _why_fixed(device) is not None:
        return candidates[_shipped(problem, [name(c) for c in candidates], device) or 0]
    key = (gpu_index(device), problem)
    position = _remembered(key, candidates, name)
    if position is None:
        with lock:  # another thread may have measured while this one waited
            position = _remembered(key, candidates, name)
            if position is None:
                position = _find(key, candidates, run, device, name, prepare)
    return candidates[position]


def _remembered(
    key: tuple[int, Problem], candidates: Sequence[T], name: Callable[[T], str]
) -> int | None:
    """Where the candidate of this process stands; only one name is made, as steps wait for it."""
    known, position = _memory.get(key, ("", -1))
    if 0 <= position < len(candidates) and name(candidates[position]) == known:
        return position
    return None


def _find(
    key: tuple[int, Problem],
    candidates: Sequence[T],
    run: Callable[[T], measure.Thunk],
    device: torch.device,
    name: Callable[[T], str],
    prepare: measure.Prepare | None,
) -> int:
    """The position to take, from what is kept or shipped, or measured; it is remembered.

    What was measured is kept; where no candidate runs the first one stands in.
    """
    problem, by_name = key[1], {name(c): c for c in candidates}
    _check(problem, len(candidates), by_name)
    names = list(by_name)
    store = store_of(machine_of(device), cache_file(device))
    position = _position(store.choices.get(problem), names)
    if position is None:
        position = _shipped(problem, names, device)
    if position is None:
        if why_not_measure(device) is not None:
            return 0  # not remembered: the next one may measure
        _announce(str(store.path))
        choice = measure.fastest(by_name, run, device, prepare)
        if choice is None:
            _log.info("%s: none of %d candidates ran", problem, len(candidates))
            position = 0
        else:
            _log.info("%s: %s, %.4f ms", problem, choice.name, choice.milliseconds[choice.name])
            store.keep(problem, choice)
            position = names.index(choice.name)
    _memory[key] = names[position], position
    return position


def _check(problem: Problem, count: int, names: Collection[str]) -> None:
    if len(names) < count:
        raise ValueError(f"candidates must have different names, got {count} with {list(names)}")
    for size in problem.sizes:
        if not isinstance(size, int | str):  # a bool is an int
            raise TypeError(f"sizes must hold int, str or bool, got {size!r} in {problem}")


def _position(choice: Choice | None, names: Sequence[str]) -> int | None:
    """Where a choice that is kept or shipped stands among today's candidates, if it does."""
    return names.index(choice.name) if choice is not None and choice.name in names else None


def _shipped(problem: Problem, names: Sequence[str], device: torch.device) -> int | None:
    return _position(table_of(machine_of(device)).get(problem), names)


@cache
def _announce(file: str) -> None:
    """Say once why the first step takes so long."""
    _log.warning(
        "measuring which kernels are fastest on this GPU: the first step of a model takes minutes, "
        "once; kept in %s (FASTRES_AUTOTUNE=0 does without)",
        file,
    )


def forget() -> None:
    """Drop everything this process knows, the environment included; files stay. For tests."""
    with lock:
        _memory.clear()
        _autotune.cache_clear()
        _announce.cache_clear()
        forget_stores()
        forget_machines()
