"""A block's forward and its backwards as programs, where the backend that runs it writes some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastres.block.backward import run_backward
from fastres.block.forward import run_forward
from fastres.block.plan import Plan
from fastres.block.running import Updates, update_now
from fastres.block.spec import Block
from fastres.block.tensors import identity_stats, split_tensors
from fastres.kernels import BACKENDS, Record, dense
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
    ours = all([one.run.__module__.startswith(_OURS) for one in plan.implementations])
    given = block.open_end or block.shortcut == "tensor"
    if device.type != "cpu" or given or not ours or "cpu" not in backends:
        return None
    return BACKENDS["cpu"].record


class Programs:
    """The programs of a block for inputs of one kind, each written down when it is first wanted.

    Every tensor has the shape, dtype and strides that it had then, but for `grad_out`. Activations
    are brought into the layout of the block in front of a program, where torch copies.
    """

    __slots__ = ("_backward", "_block", "_fmt", "_forward", "_plan", "_record")

    def __init__(self, record: Record, block: Block, plan: Plan, fmt: torch.memory_format) -> None:
        self._record, self._block, self._plan, self._fmt = record, block, plan, fmt
        self._forward: Run = _unwritten
        self._backward: dict[Any, Run] = {}

    def forward(
        self, x: Tensor, tensors: Sequence[Tensor | None], updates: Updates | None
    ) -> list[Tensor] | None:
        """[out, and what backward needs in one tensor], and the update of the running statistics.

        None where it cannot be written down; then nothing was run.
        """
        x = dense(x, self._fmt)
        inputs = [x, *[t for t in tensors if t is not None]]
        if updates is not None:
            inputs += updates.buffers
        results = self._forward(inputs)
        if results is None and self._forward is not _refused:
            self._forward = self._written(lambda: self._run_forward(x, tensors, updates), inputs)
            results = self._forward(inputs)
        if results is not None and updates is not None:
            torch.autograd.graph.increment_version(updates.buffers)
        return results

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
        kept: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor] | None:
        """What `run_backward` gives for these flags, or None where it cannot be written down."""
        grad_out, x = dense(grad_out, self._fmt), dense(x, self._fmt)
        inputs = [grad_out, x, *[t for t in tensors if t is not None], kept]
        key = (*needs, grad_out.stride())
        program = self._backward.get(key, _unwritten)
        results = program(inputs)
        if results is None and program is not _refused:
            program = self._backward[key] = self._written(
                lambda: (self._run_backward(grad_out, x, tensors, kept, needs), []), inputs
            )
            results = program(inputs)
        return results

    def _run_backward(
        self,
        grad_out: Tensor,
        x: Tensor,
        tensors: Sequence[Tensor | None],
        kept: Tensor,
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

    def views(self, kept: Tensor) -> list[Tensor]:
        """The tensors that a forward kept in one."""
        return cast(Program, self._forward).views(kept)

    def _written(self, function: Callable[[], Results], inputs: list[Tensor]) -> Run:
        """A program, unless a tensor is empty: torch has answers of its own for those."""
        if any([t.numel() == 0 for t in inputs]):
            return _refused
        channels = {t.shape[d] for t in inputs if t.dim() == 4 for d in (0, 1)}
        fixed = [identity_stats(inputs[0].new_empty(0, c, 0, 0)) for c in channels]
        return self._record(function, inputs, fixed) or _refused
