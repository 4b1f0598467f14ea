"""A block's forward and its backwards as programs, where the backend that runs it writes some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.block.backward import run_backward
from fastres.block.forward import run_forward
from fastres.block.plan import Plan
from fastres.block.running import Updates, update_now
from fastres.block.spec import Block
from fastres.block.tensors import identity_stats, split_tensors
from fastres.kernels import BACKENDS, Record
from fastres.kernels.backend import Program, Results

#: Whose implementations call nothing of a compiled module but what writes itself down.
_OURS = "fastres.kernels."


def recorder(block: Block, plan: Plan, device: torch.device) -> Record | None:
    """What writes down programs of a block, or None where it is run kernel by kernel."""
    backends = {one.backend for one in plan.implementations}
    ours = all([one.run.__module__.startswith(_OURS) for one in plan.implementations])
    if device.type != "cpu" or block.open_end or not ours or "cpu" not in backends:
        return None
    return BACKENDS["cpu"].record


class Programs:
    """The programs of a block for inputs of one kind, each written down when it is first wanted.

    Every tensor has the shape, dtype and strides that it had then, but for `grad_out`.
    """

    __slots__ = ("_backward", "_block", "_fmt", "_forward", "_plan", "_record")

    def __init__(self, record: Record, block: Block, plan: Plan, fmt: torch.memory_format) -> None:
        self._record, self._block, self._plan, self._fmt = record, block, plan, fmt
        self._forward: Program | None = _UNKNOWN
        self._backward: dict[Any, Program | None] = {}

    def forward(
        self, x: Tensor, tensors: Sequence[Tensor | None], updates: Updates | None
    ) -> list[Tensor] | None:
        """[out, and what backward needs in one tensor], and the update of the running statistics.

        None where it cannot be written down; then nothing was run.
        """
        inputs = [x, *[t for t in tensors if t is not None]]
        if updates is not None:
            inputs += updates.buffers
        self._forward, results = self._run(
            self._forward, inputs, lambda: self._run_forward(x, tensors, updates)
        )
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
        inputs = [grad_out, x, *[t for t in tensors if t is not None], kept]
        key = (*needs, grad_out.stride())
        self._backward[key], results = self._run(
            self._backward.get(key, _UNKNOWN),
            inputs,
            lambda: (self._run_backward(grad_out, x, tensors, kept, needs), []),
        )
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

    def views(self, kept: Tensor) -> list[Tensor]:
        """The tensors that a forward kept in one."""
        assert self._forward is not None
        return self._forward.views(kept)

    def _run(
        self, program: Program | None, inputs: list[Tensor], function: Callable[[], Results]
    ) -> tuple[Program | None, list[Tensor] | None]:
        """A program, and what it gives: this one, or one written down anew."""
        results = None if program in (None, _UNKNOWN) else program(inputs)
        if results is not None or program is None:
            return program, results
        program = self._written(function, inputs)
        return program, None if program is None else program(inputs)

    def _written(self, function: Callable[[], Results], inputs: list[Tensor]) -> Program | None:
        """A program, unless a tensor is empty: torch has answers of its own for those."""
        if any([t.numel() == 0 for t in inputs]):
            return None
        channels = {t.shape[d] for t in inputs if t.dim() == 4 for d in (0, 1)}
        fixed = [identity_stats(inputs[0].new_empty(0, c, 0, 0)) for c in channels]
        return self._record(function, inputs, fixed)


_UNKNOWN: Any = object()
