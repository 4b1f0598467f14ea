"""A block's input formed again from what the block in front of it keeps, instead of kept as well.

The end of a block is one pass over what its own backward reads anyway: its last raw output with the
statistics of that, and what the shortcut brings. The next block holds on to these tensors in the
place of its input, and makes the pass again when its backward begins: by the same kernel, so with
the same bits. A block whose shortcut is its input must have kept that itself; so in a row of such
blocks every other input is kept. (Rematerialisation, as in Chen et al., 2016, where it costs one
pass and no convolution.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.block.compose import end_of
from fastres.block.plan import Plan
from fastres.block.programs import Programs
from fastres.block.spec import Block
from fastres.block.tensors import Saved

#: Bytes of an input from which on it is worth the calls that it costs.
LEAST_BYTES = 1 << 20


class Origin(NamedTuple):
    """How the output of a block is formed of the tensors that it keeps.

    Attributes:
        block: which was run.
        plan: who computes it.
        programs: by which it kept all in one tensor, or None.
        tensors: what it kept, and behind that its input, where that is its shortcut.
    """

    block: Block
    plan: Plan
    programs: Programs | None
    tensors: Sequence[Tensor]

    def apart(self) -> Origin:
        """The same without its tensors, which autograd saves."""
        return self._replace(tensors=())

    def output(self, tensors: Sequence[Tensor]) -> Tensor:
        """The block's output [N, C, H, W], of the tensors."""
        x: Tensor | None = None
        if self.block.adds_input:
            *tensors, x = tensors
        saved = tensors if self.programs is None else self.programs.views(tensors)
        kept, last = Saved.unflatten(self.block, saved), len(self.block.units) - 1
        raw, stats = kept.raw[last], kept.stats[last]
        assert raw is not None
        residual, residual_stats = x, None
        if self.block.projection is not None:
            residual, residual_stats = kept.raw[-1], kept.stats[-1]
        with torch.no_grad():
            return end_of(self.plan, self.block, raw, stats, residual, residual_stats, False)[0]


def forms_again(block: Block) -> bool:
    """Whether a block's output is one pass over what it keeps, and worth it: one that was pooled
    is smaller than that.
    """
    ends = block.keeps_raw[len(block.units) - 1 :]
    sources = block.projection is not None or block.shortcut in ("none", "input")
    balanced = block.save and block.memory == "balanced" and not block.open_end
    return balanced and sources and block.simple_end and all(ends) and block.max_pool is None


def saves_plainly() -> bool:
    """Whether nobody is told of what autograd saves: hooks may move each tensor elsewhere, and what
    two blocks save would be moved twice.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


class StandIn(torch.autograd.Function):
    """A tensor that has the shape of x and its place in the graph, but no memory to speak of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Any values, x's shape."""
        return x.new_empty(1).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """What is wanted of the stand-in is wanted of x."""
        return grad


class Attached(torch.autograd.Function):
    """The value of x in the place of its stand-in: gradients of gradients find their way to x."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, value: Tensor) -> Tensor:
        """The value."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient as it is."""
        return grad, None
