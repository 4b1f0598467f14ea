"""Programs: what a function calls of our kernels, written down once and run again in one call.

The function runs once with kernels that write themselves down instead of computing
(`csrc/cpu/program.h`), so it may look at shapes but at no value. What it asks of torch meanwhile is
watched: allocations and views are free, sums and copies of parameters become steps, and with
anything else there is no program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.kernels.backend import Recorded, Results
from fastres.kernels.common import DTYPE_CODES, bytes_of, overlap
from fastres.kernels.cpu.module import module, own_memory, strided
from fastres.kernels.tape import ALLOCATE

_kernels = module()
_aten = torch.ops.aten

#: Elements that a copy step moves at most: it is for parameters, on one thread.
_MOST_COPIED = 1 << 22
#: Places in the tensor of what is kept are multiples of this many bytes, as vectors are long.
_ALIGNMENT = 64


class NotRecordableError(Exception):
    """Something was called that no step can stand for."""


# ---------------------------------------------------------------- what torch is asked for


_ZEROS = {
    dtype: torch.zeros((), dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)
}


def _copy(to: Tensor, source: Tensor, **how: object) -> None:
    """A step that copies; `how` shows in `to` already."""
    if to.numel() > _MOST_COPIED or to.dim() > 4 or not {source.dtype, to.dtype} <= {*_ZEROS}:
        raise NotRecordableError("a copy of another kind than of a parameter")
    missing = 4 - to.dim()
    _kernels.copy(
        source.data_ptr(), DTYPE_CODES[source.dtype], [*[0] * missing, *source.stride()],
        to.data_ptr(), DTYPE_CODES[to.dtype], [*[0] * missing, *to.stride()],
        [*[1] * missing, *to.shape],
    )  # fmt: skip


def _zeros(to: Tensor, like: Tensor, **how: object) -> None:
    """A step that copies a zero."""
    if to.dtype not in _ZEROS:
        raise NotRecordableError(f"zeros in {to.dtype}")
    _copy(to, _ZEROS[to.dtype].expand(to.shape))


def _stack(to: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    """A step for each part."""
    for part, source in zip(to.unbind(dim), tensors, strict=True):
        _copy(part, source)


def _add(to: Tensor, x: Tensor, r: Any, **how: object) -> None:
    """A step that adds two tensors which lie alike."""
    alike = isinstance(r, Tensor) and {x.stride(), r.stride()} == {to.stride()} and not how
    if (
        not alike
        or x.shape != r.shape
        or not {x.dtype} == {r.dtype} <= {torch.float32, torch.bfloat16}
    ):
        raise NotRecordableError("a sum of another kind than of two activations")
    if bytes_of(to) != to.numel() * to.element_size():
        raise NotRecordableError("a sum with gaps in its memory")
    _kernels.add_act(
        x.data_ptr(), r.data_ptr(), to.data_ptr(), 0, 0, 1, to.numel(), 1, 0,
        DTYPE_CODES[to.dtype], torch.get_num_threads(),
    )  # fmt: skip


#: Operators that become steps.
_STEPS: dict[Any, Callable[..., None]] = {
    _aten._to_copy.default: _copy,
    _aten.clone.default: _copy,
    _aten.zeros_like.default: _zeros,
    _aten.stack.default: _stack,
    _aten.add.Tensor: _add,
}


class _Packed(NamedTuple):
    """A weight, the copy of it that a kernel reads, and the weight's sample when that was made."""

    weight: Tensor
    copy: Tensor
    sample: int


class _Watch(TorchDispatchMode):
    """What torch is asked for while a program is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = _kernels.Recording()
        #: Held, so that no address stands for two tensors.
        self.memory: list[Tensor] = []
        self.packed: list[_Packed] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        step = _STEPS.get(func)
        if step is None and not func.is_view and func not in ALLOCATE:
            raise NotRecordableError(str(func))
        # Of an operator with a step no more than the memory of its result is wanted.
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.memory.append(result)
        if step is not None:
            step(result, *args, **(kwargs or {}))
        return result


class _Current(local):
    """The program that a thread is writing down."""

    watch: _Watch | None = None


_current = _Current()


def note_packed(weight: Tensor, copy: Tensor, sample: int) -> None:
    """Tell a program that is being written down of a packed copy that stays.

    It will not run once the weight's version or its sample has changed.
    """
    if _current.watch is not None:
        _current.watch.packed.append(_Packed(weight, copy, sample))


@contextmanager
def computing() -> Iterator[None]:
    """Inside a `with`, kernels compute, although a program may be being written down."""
    watch = _current.watch
    if watch is None:
        yield
        return
    watch.recording.exit()
    try:
        yield
    finally:
        watch.recording.enter()


# ---------------------------------------------------------------- programs


class Program:
    """Kernel calls on memory that each run is given.

    Attributes:
        steps: how many.
        layout: how what is kept lies in the tensor that holds it.
    """

    def __init__(
        self,
        core: Any,
        outputs: Sequence[Tensor],
        kept: Sequence[Tensor],
        versions: list[tuple[int, int]],
        held: Sequence[Tensor],
    ) -> None:
        self._core, self._versions, self._held = core, versions, held
        self.steps: int = core.steps
        self._outputs = [
            (tuple(t.shape), t.stride(), t.dtype, own_memory(bytes_of(t))) for t in outputs
        ]
        self._kept = [(tuple(t.shape), t.stride(), t.dtype) for t in kept]
        self._offsets, self._bytes = [], 0
        for t in kept:
            self._offsets.append(self._bytes)
            self._bytes += -(-bytes_of(t) // _ALIGNMENT) * _ALIGNMENT
        self.layout = self._offsets, self._kept

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The outputs, and in one tensor of bytes what is kept, if anything is.

        None, and nothing was run, where a weight has changed whose packed copy it reads.
        """
        for index, version in self._versions:
            if inputs[index]._version != version:
                return None
        results = [strided(*like) for like in self._outputs]
        addresses = [t.data_ptr() for t in inputs]
        addresses += [t.data_ptr() for t in results]
        if self._offsets:
            kept = strided((self._bytes,), (1,), torch.uint8, own_memory(self._bytes))
            start = kept.data_ptr()
            addresses += [start + offset for offset in self._offsets]
            results.append(kept)
        return results if self._core.run(addresses, torch.get_num_threads()) else None

    def views(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in what is kept."""
        (together,) = kept
        return [
            together[offset:].view(dtype).as_strided(shape, strides)
            for offset, (shape, strides, dtype) in zip(self._offsets, self._kept, strict=True)
        ]


def record(
    function: Callable[[], Results], inputs: Sequence[Tensor], fixed: Sequence[Tensor] = ()
) -> Recorded:
    """A program of what a function would compute, where that can be written down.

    Args:
        function: called once; it returns the outputs, and what is to be kept in one tensor.
        inputs: all tensors that it reads or writes, in the order in which a run is given others.
        fixed: tensors with which every run computes.
    """
    watch = _current.watch = _Watch()
    try:
        watch.recording.enter()
        try:
            with watch:
                outputs, kept = function()
        finally:
            watch.recording.exit()
            _current.watch = None
        return Recorded(_program(watch, inputs, outputs, kept, fixed))
    except NotRecordableError:
        return Recorded(None)


def _program(
    watch: _Watch,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    kept: Sequence[Tensor],
    fixed: Sequence[Tensor],
) -> Program:
    made = {_memory(t) for t in watch.memory}
    if not {(t.data_ptr(), bytes_of(t)) for t in (*outputs, *kept)} <= made:
        raise NotRecordableError("a result that is part of something else")
    given = [(t.data_ptr(), bytes_of(t)) for t in (*inputs, *outputs, *kept)]
    if overlap(given):
        raise NotRecordableError("memory with two names")
    fixed = [*fixed, *_ZEROS.values(), *[one.copy for one in watch.packed]]
    stays = [_memory(t) for t in fixed]
    places = {id(t): i for i, t in enumerate(inputs)}
    packed = [
        (places[id(w)], DTYPE_CODES[w.dtype], w.shape, w.stride(), sample)
        for w, _, sample in watch.packed
    ]
    versions = [(places[id(w)], w._version) for w, _, _ in watch.packed]
    try:
        core = watch.recording.program(given, sorted(made.difference(given, stays)), stays, packed)
    except ValueError as error:
        raise NotRecordableError(str(error)) from error
    return Program(core, outputs, kept, versions, fixed)


def _memory(t: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's storage."""
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
