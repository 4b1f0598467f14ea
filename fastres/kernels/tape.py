"""Programs of kernels that are launched between torch's own: written down once, run without a walk.

A function runs once, for real, while a `Tape` notes what it launches and, as a dispatch mode, what
it asks of torch. What it looked up, checked and decided on the way is the same in every run on
tensors that are alike, so nothing is left of it: the calls stand as a straight-line Python function
that makes memory anew, fills addresses in, and launches. Memory that torch's operators never see is
part of one tensor of bytes, and what is kept of such memory of another.

There is no program where a value decided something, or where memory was used that is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily

from fastres.kernels.backend import Recorded, Results
from fastres.kernels.common import bytes_of, overlap

_aten = torch.ops.aten

#: Operators that only make memory.
ALLOCATE = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
#: What torch's Python has beside its operators, for a microsecond a call instead of five.
_DIRECT: dict[Any, Callable[..., Any]] = {
    _aten.convolution.default: torch.convolution,
    _aten.mm.out: torch.mm,
    _aten.addmm.out: torch.addmm,
    _aten.addmm_.default: Tensor.addmm_,
    _aten.add.Tensor: torch.add,
    _aten.add_.Tensor: Tensor.add_,
    _aten.mul.Tensor: torch.mul,
    _aten.mul_.Tensor: Tensor.mul_,
    _aten.clone.default: torch.clone,
    _aten.zeros_like.default: torch.zeros_like,
    _aten.stack.default: torch.stack,
}
_TO: Callable[..., Any] = Tensor.to
#: Memory of more bytes is made where it is used and freed behind that, as the walk does.
_LARGE = 4 << 20
#: Places in a tensor of bytes are multiples of this many.
_ALIGNMENT = 256


class Anew(NamedTuple):
    """An argument of a launch that is asked for in each run, say torch's current stream."""

    ask: Callable[[], Any]


class _Step(NamedTuple):
    """A call: of an operator that makes memory or a view, or of anything else."""

    kind: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: tuple[Tensor | None, ...] = ()
    several: bool = False


class Tape(TorchDispatchMode):
    """What is launched, and what torch is asked for, while a function runs."""

    def __init__(self, inputs: Sequence[Tensor], fixed: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.inputs, self.fixed = inputs, fixed
        self.refused: str | None = None
        #: What has to be false in a run, and which inputs have to lie at multiples of 16 bytes.
        self.unless: list[Callable[[], bool]] = []
        self.aligned: list[Tensor] = []
        self._paused = 0
        self._originals: dict[int, Tensor] = {}
        #: Held, so that no identity and no address stands for two tensors.
        self._held: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is _aten.detach.default:  # What a dispatch mode returns, autograd asks for.
            self._originals[id(result)] = self.original(args[0])
            self._held.append(result)
        elif not self._paused:
            kind = "view" if func.is_view else "memory" if func in ALLOCATE else "call"
            several = isinstance(result, (list, tuple))
            results = tuple(result) if several else (result,)
            if func is _aten._to_copy.default and kwargs.keys() == {"dtype"}:
                kwargs, function = {**kwargs, "copy": True}, _TO
            else:
                function = _DIRECT.get(func) or getattr(func, "_op", func)
            self._note(_Step(kind, function, tuple(args), kwargs, results, several))
            if not all(one is None or isinstance(one, Tensor) for one in results):
                self.refuse(f"{func} says something of a value")
        return result

    def _note(self, step: _Step) -> None:
        self._held.append((step.arguments, step.options))
        arguments, options = self.original(step.arguments), self.original(step.options)
        self.steps.append(step._replace(arguments=arguments, options=options))

    def original(self, value: Any) -> Any:
        """Arguments with tensors as their operators made them, before they were detached."""
        if isinstance(value, Tensor):
            return self._originals.get(id(value), value)
        if isinstance(value, dict):
            return {name: self.original(one) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            parts = [self.original(one) for one in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Note a call that writes into tensors that it is given."""
        if not self._paused:
            self._note(_Step("call", function, arguments, options))

    def launch(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """Note a call that takes addresses: where a tensor stands among its arguments, that one's.

        A launch after it finds what this one wrote; nothing else does before the stream is waited
        for.
        """
        if not self._paused:
            self._note(_Step("launch", function, tuple(arguments), {}))

    def refuse(self, why: str) -> None:
        """There will be no program."""
        if not self._paused:
            self.refused = self.refused or why

    def holds(
        self, aligned: Iterable[Tensor | None], unless: Callable[[], bool] | None = None
    ) -> None:
        """Note what a decision depended on: tensors at multiples of 16 bytes, and a condition."""
        if not self._paused:
            self.aligned += [self.original(t) for t in aligned if t is not None]
            self.unless += [] if unless is None else [unless]

    @property
    def is_paused(self) -> bool:
        """Whether nothing is noted at the moment."""
        return self._paused > 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside a `with` nothing is noted."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1


class _Current(local):
    """The tape that a thread writes on."""

    tape: Tape | None = None


_current = _Current()


def taping() -> Tape | None:
    """The tape on which this thread's launches are to be noted."""
    return _current.tape


@contextmanager
def untaped() -> Iterator[None]:
    """Inside a `with` a tape notes nothing: what is only measured is no part of a program.

    Nor does a dispatch mode stand in its way, which would be measured with it.
    """
    if (tape := _current.tape) is None or tape.is_paused:
        yield
        return
    with tape.paused(), _pop_mode_temporarily():
        yield


def record(
    function: Callable[[], Results], inputs: Sequence[Tensor], fixed: Sequence[Tensor] = ()
) -> Recorded:
    """What a function computes, and a program of it where one can be written down.

    Args:
        function: called once; it returns the outputs, and what is to be kept.
        inputs: all tensors that it reads or writes, in the order in which a run is given others.
        fixed: tensors with which every run computes.
    """
    tape = _current.tape = Tape(inputs, fixed)
    try:
        with tape:
            results = function()
    finally:
        _current.tape = None
    if tape.refused is not None or overlap([(t.data_ptr(), bytes_of(t)) for t in inputs]):
        return Recorded(None, results)
    try:
        return Recorded(_Writer(tape, *results).program(), results)
    except _UnknownTensorError:
        return Recorded(None, results)


# ---------------------------------------------------------------- programs


class _UnknownTensorError(Exception):
    """A step reads memory that is neither given, nor fixed, nor made by another step."""


class TapeProgram:
    """Calls on memory that each run is given.

    Attributes:
        steps: how many launches and operators that compute.
        layout: how what is kept lies in the tensors that hold it.
        text: the function that makes them.
    """

    def __init__(
        self, text: str, names: dict[str, Any], steps: int, layout: Sequence[_Place]
    ) -> None:
        self.text, self.steps, self.layout = text, steps, layout
        exec(compile(text, "<program of a block>", "exec"), names)
        self._run: Callable[[Sequence[Tensor]], list[Tensor] | None] = names["run"]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The outputs, and what is kept; None, and nothing was run, where it holds no longer."""
        return self._run(inputs)

    def views(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in what is kept."""
        return [place.of(kept) for place in self.layout]


class _Place(NamedTuple):
    """Where a tensor is among those that hold what is kept: itself, or bytes of the first."""

    which: int
    start: int | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, kept: Sequence[Tensor]) -> Tensor:
        """The tensor."""
        which, start, shape, stride, dtype = self
        if start is None:
            return kept[which]
        # Dense in memory: what is kept as bytes was made by an operator that only makes memory.
        end = start + dtype.itemsize * math.prod(shape)
        return kept[which][start:end].view(dtype).as_strided(shape, stride)


class _Line(NamedTuple):
    """A statement, the names that it reads, and the one that it makes."""

    text: str
    reads: frozenset[str]
    makes: str | None = None


class _Arena:
    """Memory that only launches see, in one tensor of bytes."""

    def __init__(self, name: str) -> None:
        self.name, self.size = name, 0
        self.offsets: dict[int, int] = {}

    def place(self, t: Tensor) -> int:
        """Where a tensor's memory begins."""
        if id(t) not in self.offsets:
            self.offsets[id(t)] = self.size
            self.size += -(-t.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        return self.offsets[id(t)]


class _Writer:
    """Makes the text of a program out of a tape."""

    def __init__(self, tape: Tape, outputs: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        self.tape = tape
        self.outputs, self.kept = tape.original([*outputs]), tape.original([*kept])
        self.values: dict[str, Any] = {}  # the constants, by name
        self.lines: list[_Line] = []
        self.asked: dict[Any, str] = {}
        self.kept_bytes, self.own_bytes = _Arena("kept"), _Arena("own")
        self.names = {id(t): f"i{i}" for i, t in enumerate(tape.inputs)}
        self.owners: dict[int, Tensor] = {}  # who made a storage, by its address
        for t in tape.fixed:
            self.names[id(t)] = self._constant(t)
            self._own(t)
        for step in tape.steps:
            for made in step.results if step.kind != "view" else ():
                if made is not None:
                    self._own(made)
        self.wanted = self._wanted()

    # ------------------------------------------------------------ whose memory

    def _own(self, t: Tensor) -> None:
        """Remember who made a storage; not of what lies in an input."""
        storage = t.untyped_storage()
        if storage.nbytes() and self._input(t) is None:
            self.owners.setdefault(storage.data_ptr(), t)

    def _input(self, t: Tensor) -> Tensor | None:
        """The input in which a tensor lies."""
        address = t.data_ptr()
        for one in self.tape.inputs:
            if one is t or 0 <= address - one.data_ptr() < bytes_of(one):
                return one
        return None

    def _owner(self, t: Tensor) -> Tensor:
        """The input, or the tensor made by a step, in whose memory a tensor lies."""
        given = self._input(t)
        found = self.owners.get(t.untyped_storage().data_ptr()) if given is None else given
        if found is None:
            raise _UnknownTensorError
        return found

    def _wanted(self) -> set[int]:
        """Identities of the tensors that have to be there as tensors, not as addresses alone."""
        parts = [t for t in self.kept if self._owner(t) is not t]
        wanted = {id(one) for t in (*self.outputs, *parts) for one in (t, self._owner(t))}
        for step in reversed(self.tape.steps):
            made = [t for t in step.results if t is not None]
            if step.kind == "memory":
                wanted |= {id(t) for t in made if bytes_of(t) > _LARGE}
            elif step.kind == "call":
                wanted |= {id(t) for t in (*made, *self._read(step))}
            elif step.kind == "view":
                for t in [one for one in made if id(one) in wanted]:
                    owner = self._strided(t)
                    wanted |= {id(one) for one in (self._read(step) if owner is None else [owner])}
        return wanted

    def _read(self, step: _Step) -> Iterator[Tensor]:
        """What an operator reads, and who owns that."""
        for t in (*_tensors(step.arguments), *_tensors(step.options)):
            yield t
            if t.numel():
                yield self._owner(t)

    def _strided(self, t: Tensor) -> Tensor | None:
        """The owner of which a tensor is a view by strides alone, or None."""
        owner = self._owner(t) if t.numel() else None
        return owner if owner is not None and owner.dtype == t.dtype else None

    def _as_bytes(self, owner: Tensor) -> _Arena | None:
        """The arena that an owner's memory is part of, or None where it is a tensor."""
        if id(owner) in self.names or id(owner) in self.wanted:
            return None
        kept = any(self._owner(t) is owner for t in self.kept)
        return self.kept_bytes if kept else self.own_bytes

    # ------------------------------------------------------------ how it is written

    def _constant(self, value: Any) -> str:
        """A value as it stands in the text."""
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = f"c{len(self.values)}"
        self.values[name] = value
        return name

    def _written(self, value: Any, tensor: Callable[[Tensor], str]) -> str:
        """An argument; `tensor` writes those."""
        if isinstance(value, Tensor):
            return tensor(value)
        if isinstance(value, Anew):
            return self.asked.setdefault(value, f"a{len(self.asked)}")
        if isinstance(value, (list, tuple)) and any(True for _ in _tensors(value)):
            parts = ", ".join([self._written(one, tensor) for one in value])
            fields = hasattr(value, "_fields")
            return f"{self._constant(type(value))}({parts})" if fields else f"[{parts}]"
        return self._constant(value)

    def _tensor(self, t: Tensor) -> str:
        """The name of a tensor, which a step before has made."""
        if id(t) not in self.names:
            raise _UnknownTensorError
        return self.names[id(t)]

    def _address(self, t: Tensor) -> str:
        """A tensor's address, where launches read it."""
        if t.numel() == 0:
            return "0"
        owner = self._owner(t)
        arena = self._as_bytes(owner)
        offset = t.data_ptr() - owner.data_ptr()
        if arena is not None:
            name, offset = f"p_{arena.name}", offset + arena.place(owner)
        else:
            value = self._tensor(owner)
            name = f"p_{value}"
            if not any(line.makes == name for line in self.lines):
                self._line(f"{name} = {value}.data_ptr()", name, value)
            # Whoever reads the address needs the memory.
            self.touched.add(value)
        self.touched.add(name)
        return f"{name} + {offset}" if offset else name

    def _line(self, text: str, makes: str | None, *reads: str) -> None:
        self.lines.append(_Line(text, frozenset(reads), makes))

    # ------------------------------------------------------------ step by step

    def program(self) -> TapeProgram:
        """The program of the tape."""
        # In the order in which they are kept, so that another program of the same has its layout.
        for t in self.kept:
            if (arena := self._as_bytes(self._owner(t))) is not None:
                arena.place(self._owner(t))
        steps = 0
        for step in self.tape.steps:
            self.touched: set[str] = set()
            if step.kind == "launch":
                self._launch(step)
            elif step.kind == "call":
                self._call(step)
            elif any(id(t) in self.wanted for t in step.results):
                (self._view if step.kind == "view" else self._memory)(step)
            steps += step.kind in ("launch", "call")
        own = [t for t in self.kept if self._as_bytes(self._owner(t)) is None]
        returned = [*self.outputs, *own]
        names = [self._tensor(t) for t in returned]
        if self.kept_bytes.size:
            names.insert(len(self.outputs), "kept")
        text = "\n    ".join([
            "def run(inputs):", *self._head(), *self._body({*names}), f"return [{', '.join(names)}]"
        ])  # fmt: skip
        return TapeProgram(text, self.values, steps, self._layout())

    def _launch(self, step: _Step) -> None:
        of = [self._written(0 if one is None else one, self._address) for one in step.arguments]
        self._line(f"{self._constant(step.function)}({', '.join(of)})", None, *self.touched)

    def _call(self, step: _Step) -> None:
        text, reads = self._called(step)
        made = [t for t in step.results if t is not None and id(t) not in self.names]
        name = self._new(made[0]) if made else None
        if step.several:
            whole = f"r{len(self.lines)}"
            self._line(f"{whole} = {text}", whole, *reads)
            for i, t in enumerate(step.results):
                if t is not None and id(t) in {id(one) for one in made}:
                    part = self._new(t)
                    self._line(f"{part} = {whole}[{i}]", part, whole)
            self._line(f"{whole} = None", None, whole)
        else:
            self._line(text if name is None else f"{name} = {text}", name, *reads)

    def _called(self, step: _Step) -> tuple[str, set[str]]:
        """The call, and the names that it reads."""
        reads: set[str] = set()

        def tensor(t: Tensor) -> str:
            name = self._tensor(t)
            reads.add(name)
            return name

        given = [self._written(one, tensor) for one in step.arguments]
        given += [f"{name}={self._written(v, tensor)}" for name, v in step.options.items()]
        return f"{self._constant(step.function)}({', '.join(given)})", reads

    def _new(self, t: Tensor) -> str:
        return self.names.setdefault(id(t), f"v{len(self.names)}")

    def _memory(self, step: _Step) -> None:
        (t,) = step.results
        assert t is not None
        make = self._constant(torch.empty_strided)
        shape, dtype = self._like(t), self._constant(t.dtype)
        device, name = self._constant(t.device), self._new(t)
        self._line(f"{name} = {make}({shape}, dtype={dtype}, device={device})", name)

    def _like(self, t: Tensor) -> str:
        return f"{self._constant(tuple(t.shape))}, {self._constant(t.stride())}"

    def _view(self, step: _Step) -> None:
        """A view in one call, however many it took; several where it has another dtype."""
        for t in step.results:
            if t is None or id(t) not in self.wanted:
                continue
            if (owner := self._strided(t)) is not None:
                text, reads = self._part(t, owner)
            elif not step.several:
                text, reads = self._called(step)
            else:
                raise _UnknownTensorError
            name = self._new(t)
            self._line(f"{name} = {text}", name, *reads)

    def _part(self, t: Tensor, owner: Tensor) -> tuple[str, set[str]]:
        """A view by strides, and the name that it reads."""
        base, make = self._tensor(owner), self._constant(torch.as_strided)
        offset = str(t.storage_offset())
        if self._input(t) is owner:
            offset = f"{base}.storage_offset() + {t.storage_offset() - owner.storage_offset()}"
        return f"{make}({base}, {self._like(t)}, {offset})", {base}

    # ------------------------------------------------------------ around them

    def _head(self) -> list[str]:
        """What comes first: whether it holds, and what is asked or made once a run."""
        lines = [f"{''.join(f'i{i}, ' for i in range(len(self.tape.inputs)))} = inputs"]
        aligned = {self._owner(t) for t in self.tape.aligned} & {*self.tape.inputs}
        tests = [f"{self._constant(one)}()" for one in dict.fromkeys(self.tape.unless)]
        tests += [f"{self._tensor(t)}.data_ptr() % 16" for t in self.tape.inputs if t in aligned]
        if tests:
            lines.append(f"if {' or '.join(tests)}: return None")
        lines += [f"{name} = {self._constant(one.ask)}()" for one, name in self.asked.items()]
        device = self._constant(self.tape.inputs[0].device)
        for arena in (self.kept_bytes, self.own_bytes):
            if arena.size:
                make, dtype = self._constant(torch.empty), self._constant(torch.uint8)
                make = f"{make}({arena.size}, dtype={dtype}, device={device})"
                lines.append(f"{arena.name} = {make}")
                lines.append(f"p_{arena.name} = {arena.name}.data_ptr()")
        return lines

    def _body(self, returned: set[str]) -> list[str]:
        """The statements, each tensor freed behind the last that reads it."""
        last = {name: i for i, line in enumerate(self.lines) for name in line.reads}
        body = []
        for i, line in enumerate(self.lines):
            body.append(line.text)
            dead = [n for n in sorted(line.reads) if last[n] == i and n[0] == "v"]
            if line.makes is not None and line.makes not in last and line.makes[0] == "v":
                dead.append(line.makes)
            dead = [name for name in dead if name not in returned]
            if dead:
                body.append(f"del {', '.join(dead)}")
        return body

    def _layout(self) -> list[_Place]:
        """Where each tensor is that is kept."""
        places, index = [], 1 if self.kept_bytes.size else 0
        for t in self.kept:
            start, owner = None, self._owner(t)
            if self._as_bytes(owner) is not None:
                start = self.kept_bytes.place(owner) + t.data_ptr() - owner.data_ptr()
            at = index if start is None else 0
            places.append(_Place(at, start, tuple(t.shape), t.stride(), t.dtype))
            index += start is None
        return places


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors among arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])
