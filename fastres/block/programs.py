"""A block's forward and its backwards as programs, where the backend that runs it writes some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fastres.block.backward import run_backward
from fastres.block.forward import run_forward
from fastres.block.plan import Plan, switches
from fastres.block.running import Updates, update_now
from fastres.block.spec import Block
from fastres.block.tensors import identity_stats, split_tensors
from fastres.kernels import BACKENDS, Record, dense, implementations
from fastres.kernels.backend import Program, Results

#: A program, or one of the two functions that stand for none.
Run = Callable[[Sequence[Tensor]], list[Tensor] | None]


def _unwritten(inputs: Sequence[Tensor]) -> None:
    """There is no program yet."""


def _refused(inputs: Sequence[Tensor]) -> None:
    """There can be none."""


#: Whose implementations call nothing of a compiled module but what writes itself down.
_OURS = "fastres.kernels."


def recorder(block: Block, plan: Plan, device: torch.device) -> Record | None:
    """What writes down programs of a block, or None where it is run kernel by kernel."""
    backends = {one.backend for one in plan.implementations}
    may_run = (*plan.implementations, *implementations("update_running"))
    ours = all([_module_of(one.run).startswith(_OURS) for one in may_run])
    if block.open_end or block.shortcut == "tensor" or not ours:
        return None
    records = {BACKENDS[name].record for name in backends - {"aten"}}
    return records.pop() if len(records) == 1 else None


def _module_of(run: Callable[..., object]) -> str:
    """Where an implementation stands."""
    return run.func.__module__ if isinstance(run, partial) else run.__module__


def _autocast_of(device: str) -> torch.dtype | None:
    """What autocast makes of torch's products now: a backward may be called within it."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _capturing(t: Tensor) -> bool:
    """Whether a CUDA graph is being captured: choices that are made then are not the last word."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


class Programs:
    """The programs of a block for inputs of one kind, each written down when it is first wanted.

    Every tensor has the shape, dtype and strides that it had then, but for `grad_out`. Activations
    are brought into the layout of the block in front of a program, where torch copies.
    """

    __slots__ = ("_backward", "_block", "_first", "_fmt", "_forward", "_plan", "_record")

    def __init__(self, record: Record, block: Block, plan: Plan, fmt: torch.memory_format) -> None:
        self._record, self._block, self._plan, self._fmt = record, block, plan, fmt
        self._forward: Run = _unwritten
        self._first: Program | None = None
        self._backward: dict[Any, Run] = {}

    def forward(
        self, x: Tensor, tensors: Sequence[Tensor | None], updates: Updates | None
    ) -> tuple[list[Tensor], bool] | None:
        """[out, *what backward needs], and the update of the running statistics; and whether what
        backward needs is as `views` takes it, and not as `run_forward` gives it.

        None where it cannot be written down; then nothing was run.
        """
        x = dense(x, self._fmt)
        inputs = [x, *[t for t in tensors if t is not None]]
        if updates is not None:
            inputs += updates.buffers
        results = self._forward(inputs)
        if results is None and self._forward is not _refused:
            program, done = self._written(lambda: self._run_forward(x, tensors, updates), inputs)
            self._forward = self._alike(program)
            if done is not None:
                return [*done[0], *done[1]], False
            results = self._forward(inputs)
        if results is None:
            return None
        if updates is not None:
            torch.autograd.graph.increment_version(updates.buffers)
        return results, True

    def _run_forward(
        self, x: Tensor, tensors: Sequence[Tensor | None], updates: Updates | None
    ) -> Results:
        units = split_tensors(tensors)
        out, *saved = run_forward(self._block, x, None, units, self._plan, self._fmt)
        if updates is not None:
            update_now(updates.after(saved), self._block.backend)
        return [out], saved if self._block.save else []

    def backward(
        self,
        grad_out: Tensor,
        x: Tensor,
        tensors: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor] | None:
        """What `run_backward` gives for these flags, or None where it cannot be written down."""
        grad_out, x = dense(grad_out, self._fmt), dense(x, self._fmt)
        inputs = [grad_out, x, *[t for t in tensors if t is not None], *kept]
        key = (*needs, grad_out.stride(), switches(x.device.type), _autocast_of(x.device.type))
        program = self._backward.get(key, _unwritten)
        results = program(inputs)
        if results is None and program is not _refused:
            program, done = self._written(
                lambda: (self._run_backward(grad_out, x, tensors, kept, needs), []), inputs
            )
            self._backward[key] = program
            results = [*done[0]] if done is not None else program(inputs)
        return results

    def _run_backward(
        self,
        grad_out: Tensor,
        x: Tensor,
        tensors: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor]:
        units, saved = split_tensors(tensors), self.views(kept)
        return run_backward(
            self._block, grad_out, None, x, units, saved, needs, self._plan, self._fmt
        )

    @property
    def steps(self) -> tuple[int, ...]:
        """How many kernels forward calls, and each backward; 0 where nothing was written down."""
        return tuple([getattr(p, "steps", 0) for p in (self._forward, *self._backward.values())])

    def views(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in what a forward's program kept."""
        assert self._first is not None
        return self._first.views(kept)

    def _alike(self, program: Run) -> Run:
        """A forward's program, unless a backward could mistake what it keeps for another's."""
        if program is _unwritten or program is _refused:
            return program
        written = cast(Program, program)
        self._first = self._first or written
        return program if written.layout == self._first.layout else _refused

    def _written(
        self, function: Callable[[], Results], inputs: list[Tensor]
    ) -> tuple[Run, Results | None]:
        """A program, unless a tensor is empty: torch has answers of its own for those; and what
        was computed meanwhile.
        """
        if any([t.numel() == 0 for t in inputs]):
            return _refused, None
        if _capturing(inputs[0]):
            return _unwritten, function()
        channels = {t.shape[d] for t in inputs if t.dim() == 4 for d in (0, 1)}
        fixed = [identity_stats(inputs[0].new_empty(0, c, 0, 0)) for c in channels]
        program, done = self._record(function, inputs, fixed)
        return program or _refused, done
