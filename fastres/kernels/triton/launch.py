"""Launching Triton kernels: on the right device, and without paying twice for the same launch.

A `kernel[grid](...)` of Triton looks at every argument to find the right binary, tens of
microseconds each time. What it finds depends on the kernel, its constants, the dtypes, the
alignment of the pointers and the sizes, so the launch is bound to the binary and kept by these.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from hashlib import sha256
from importlib import import_module
from inspect import getsource, ismodule
from pkgutil import iter_modules
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels.tape import taping
from fastres.kernels.triton.support import interpreted
from fastres.kernels.tuned import tuned as choice

Grid = tuple[int, ...]

#: Binaries by everything that a launch's binary depends on. Sizes of a model are few; a service
#: that sees ever new ones starts over now and then.
_bound: dict[tuple[Any, ...], Callable[..., None]] = {}
_MOST_BOUND = 16384

#: Registers per thread that a kernel may have: all there are. ptxas, left to itself, spills a few
#: to fit one more program on a multiprocessor.
MAX_REGISTERS = 255


def options_of(max_registers: int | None) -> dict[str, Any]:
    """Compiler options; whether to fuse multiplications and additions is no version's default."""
    capped = {} if max_registers is None or torch.version.hip else {"maxnreg": max_registers}
    return {"enable_fp_fusion": True, **capped}


@cache
def kernels() -> Any:
    """`fastres.triton_kernels` with all of its modules; the first call imports Triton."""
    package = import_module("fastres.triton_kernels")
    for info in iter_modules(package.__path__, f"{package.__name__}."):
        import_module(info.name)
    return package


@lru_cache(maxsize=256)
def source_hash(module: str) -> str:
    """Identifies the text of a module of kernels, and of all modules of fastres' own."""
    modules = {import_module(module), *filter(ismodule, vars(kernels()).values())}
    text = "".join(sorted(getsource(m) for m in modules))
    return sha256(text.encode()).hexdigest()[:16]


def in_words(constant: Any) -> int | str | bool:
    """A constant of a kernel as the autotuner's key has it: a function by its name.

    The text of one from outside is not in `source_hash`, so it is in the key.
    """
    if isinstance(constant, (int, str)):
        return constant
    if constant is None:
        return "-"
    function = constant.fn
    if function.__module__.startswith("fastres.triton_kernels."):
        return str(function.__name__)
    return f"{function.__module__}.{function.__name__}-{_text_hash(function)}"


@lru_cache(maxsize=256)
def _text_hash(function: Any) -> str:
    return sha256(getsource(function).encode()).hexdigest()[:16]


class Described(NamedTuple):
    """A dense matrix [rows, cols] that a kernel takes as a tensor descriptor of a block's shape."""

    matrix: Tensor
    block: tuple[int, int]

    @property
    def argument(self) -> Any:
        """What Triton takes."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(self.matrix, list(self.block))


Argument = Tensor | Described | None


def _type_of(t: Argument) -> Any:
    """A pointer's dtype, (dtype, block) of a tensor descriptor, None for none."""
    if t is None:
        return None
    return (t.matrix.dtype, t.block) if isinstance(t, Described) else t.dtype


def _kind(t: Argument) -> Any:
    """What a binary depends on: the type, and of a pointer its alignment."""
    return (_type_of(t), t.data_ptr() % 16) if isinstance(t, Tensor) else _type_of(t)


def _passed(tensors: Sequence[Argument]) -> list[Any]:
    return [t.argument if isinstance(t, Described) else t for t in tensors]


class Launch(NamedTuple):
    """A launch that was recorded: all that its binary depends on, and its grid.

    `dtypes` are as `_type_of` says them.
    """

    kernel: Any
    grid: Grid
    dtypes: tuple[Any, ...]
    sizes: tuple[int | float, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    max_registers: int | None


class _Recording(threading.local):
    """Where this thread's launches go instead of to the GPU; whether for every candidate."""

    launches: list[Launch] | None = None
    every: bool = False


_recording = _Recording()


@contextmanager
def recording(every: bool = False) -> Iterator[list[Launch]]:
    """Collect this thread's launches inside a `with` instead of running them.

    Results stay unwritten. With `every`, the launches of all candidates that are to be tuned.
    """
    before = _recording.launches, _recording.every
    _recording.launches, _recording.every = [], every
    try:
        yield _recording.launches
    finally:
        _recording.launches, _recording.every = before


def launch(
    kernel: Any,
    grid: Grid,
    tensors: Sequence[Argument],
    sizes: Sequence[int | float],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int | None = MAX_REGISTERS,
) -> None:
    """Run a kernel on the device of its first tensor, on torch's current stream.

    Args:
        kernel: a `triton.jit` function whose parameters are tensors, then numbers, then constants.
        grid: programs; an empty grid is not launched.
        tensors: inputs and outputs; None for one that is absent.
        sizes: the numbers.
        constants: the constexpr parameters, in their order.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
        max_registers: cap on a thread's registers (NVIDIA); None leaves it to the compiler.
    """
    if 0 in grid:
        return
    argument = next(t for t in tensors if t is not None)
    first = argument.matrix if isinstance(argument, Described) else argument
    if (recorded := _recording.launches) is not None:
        dtypes, values = tuple(map(_type_of, tensors)), tuple(constants.items())
        shape = (num_warps, num_stages, max_registers)
        recorded.append(Launch(kernel, grid, dtypes, tuple(sizes), values, *shape))
        return
    given = (kernel, grid, tensors, sizes, constants)
    options = {"num_warps": num_warps, "num_stages": num_stages, "max_registers": max_registers}
    if (tape := taping()) is None:
        _launch(first, *given, options)
        return
    tape.call(launch, *given, **options)
    with tape.paused():
        _launch(first, *given, options)


def _launch(
    first: Tensor,
    kernel: Any,
    grid: Grid,
    tensors: Sequence[Argument],
    sizes: Sequence[int | float],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    if first.device.type != "cuda":
        kernel[grid](*_passed(tensors), *sizes, **constants)
        return
    # Triton launches on the current device.
    with torch.cuda.device_of(first):
        _launch_bound(kernel, grid, tensors, sizes, constants, device=first.device, **options)


def _launch_bound(
    kernel: Any,
    grid: Grid,
    tensors: Sequence[Argument],
    sizes: Sequence[int | float],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    max_registers: int | None,
    device: torch.device,
) -> None:
    values = tuple(constants.values())
    kinds = tuple([_kind(t) for t in tensors])
    key = (kernel, grid, kinds, *sizes, values, num_warps, num_stages, device.index)
    bound = _bound.get(key)
    if bound is not None:
        bound(*_passed(tensors), *sizes, *values)
        return
    compiled = kernel[grid](
        *_passed(tensors),
        *sizes,
        **constants,
        num_warps=num_warps,
        num_stages=num_stages,
        **options_of(max_registers),
    )
    if len(_bound) >= _MOST_BOUND:
        _bound.clear()
    full = (*grid, 1, 1)[:3]
    _bound[key] = compiled[full]


def tuned(
    name: str,
    module: str,
    sizes: tuple[int | str | bool, ...],
    candidates: Sequence[Any],
    run: Callable[[Any], object],
    device: torch.device,
) -> Any:
    """The launch shape to use: the autotuner's choice among `candidates`.

    Args:
        name: of the kernel.
        module: the full name of the one it stands in.
        sizes: what the choice depends on, apart from device and source.
        candidates: launch shapes, the heuristic's first.
        run: computes into fresh memory with one candidate, so that tuning changes nothing.
        device: where it is to run.
    """
    if interpreted():
        return candidates[0]
    if _recording.every:
        for candidate in candidates[1:]:
            run(candidate)
        return candidates[0]
    return choice(name, source_hash(module), sizes, candidates, run, device, compile_together)


def compile_together(thunks: Sequence[Callable[[], object]]) -> None:
    """Compile what some functions would launch side by side, in threads.

    A second of work each, and an autotuner compiles hundreds. Triton finds the binaries when they
    are launched. What cannot be compiled fails once more there, and says why.
    """
    import triton

    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:  # before Triton 3.5
        return
    with recording(every=True) as launches:
        for thunk in thunks:
            with suppress(Exception):
                thunk()
    with ThreadPoolExecutor(_processors()) as pool, mode(pool, ignore_errors=True):
        for one in dict.fromkeys(launches):
            with suppress(Exception):  # of Triton's own classes
                one.kernel.warmup(
                    *map(_stand_in, one.dtypes),
                    *one.sizes,
                    grid=one.grid,
                    **dict(one.constants),
                    num_warps=one.num_warps,
                    num_stages=one.num_stages,
                    **options_of(one.max_registers),
                )


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stand_in(kind: Any) -> Any:
    """What Triton's `warmup` takes for an argument of a type that `_type_of` says."""
    if not isinstance(kind, tuple):
        return kind
    from triton.runtime.jit import MockTensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    dtype, block = kind
    return TensorDescriptor(MockTensor(dtype), list(block), [block[1], 1], list(block))
