"""The autograd Function that runs any block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.block.backward import needs_of, run_backward
from fastres.block.forward import run_forward
from fastres.block.plan import Plan
from fastres.block.programs import Programs, recorder
from fastres.block.rematerialise import (
    LEAST_BYTES,
    Attached,
    Origin,
    StandIn,
    forms_again,
    saves_plainly,
)
from fastres.block.running import Updates
from fastres.block.second import torch_backward, wants_torch
from fastres.block.spec import UNIT_TENSORS, Block
from fastres.block.tensors import split_tensors

#: Their places: those that a backward reads.
_WEIGHT, _BIAS, _FACTOR = 0, 1, 6


class Run(NamedTuple):
    """A block, with what the autograd Function has to know of it.

    Attributes:
        block: what is computed.
        text: the same as text.
        means: how many means over images it returns: 1 with an open end, else 0.
        norms: how many of its units have a norm.
        keeps: of x and of each tensor of its units, whether a backward is given it.
        plan: who computes it, where that was decided; None leaves it to the operators.
        fmt: layout of its activations.
        reads: what a backward reads of them, by the gradients that have been wanted so far.
        programs: its kernel calls written down, for inputs of one kind, or None.
    """

    block: Block
    text: str
    means: int
    norms: int
    keeps: tuple[bool, ...]
    plan: Plan | None
    fmt: torch.memory_format
    reads: dict[tuple[bool, ...], tuple[bool, ...]]
    programs: Programs | None = None

    @classmethod
    def of(cls, block: Block, plan: Plan | None, fmt: torch.memory_format) -> Run:
        """What follows from the block."""
        units = block.all_units
        keeps = [place in (_WEIGHT, _FACTOR) for _ in units for place in range(UNIT_TENSORS)]
        for i, again in enumerate(block.recomputed):
            keeps[UNIT_TENSORS * i + _BIAS] |= again
        keeps.insert(0, True)
        norms = sum([unit.norm is not None for unit in units])
        return cls(block, block.encode(), int(block.open_end), norms, tuple(keeps), plan, fmt, {})

    def with_programs(self, device: torch.device) -> Run:
        """The same, for inputs of one kind: their kernel calls are written down where they can."""
        record = None if self.plan is None else recorder(self.block, self.plan, device)
        if record is None or self.plan is None:
            return self
        return self._replace(programs=Programs(record, self.block, self.plan, self.fmt))

    def read(self, wanted: tuple[bool, ...]) -> tuple[bool, ...]:
        """Of x and of each tensor of the units, whether a backward reads it.

        Args:
            wanted: which of x, the residual and all tensors want a gradient.
        """
        if self.plan is None:  # A compiler would trace through whatever is kept.
            return needs_of(self.block, _flags(wanted)).reads
        found = self.reads.get(wanted)
        if found is None:
            found = self.reads[wanted] = needs_of(self.block, _flags(wanted)).reads
        return found

    @property
    def written(self) -> Programs | None:
        """The programs by which it runs, where nobody watches or rewrites operators."""
        return None if torch._C._len_torch_dispatch_stack() else self.programs

    @property
    def direct(self) -> bool:
        """Whether it runs without the dispatcher: nobody watches or rewrites operators."""
        return self.plan is not None and torch._C._len_torch_dispatch_stack() == 0


def _flags(wanted: Sequence[bool]) -> tuple[bool, ...]:
    """`wanted` without running statistics, as `run_backward` takes it."""
    flags = [*wanted[:2]]
    for i in range(2, len(wanted), UNIT_TENSORS):
        flags += (*wanted[i : i + 4], wanted[i + _FACTOR])
    return tuple(flags)


def _forward(
    run: Run,
    x: Tensor,
    residual: Tensor | None,
    tensors: Sequence[Tensor | None],
    updates: Updates | None,
) -> list[Tensor]:
    """[out, mean, what is saved]; with the updates made."""
    if run.direct:
        units = split_tensors(tensors)
        results = run_forward(run.block, x, residual, units, run.plan, run.fmt)
    else:
        results = torch.ops.fastres.block_forward(x, residual, list(tensors), run.text)
    if updates is not None:
        updates(results[1 + run.means : 1 + run.means + run.norms])
    return results  # type: ignore[no-any-return]


class _BlockFunction(torch.autograd.Function):
    """out, *means, *stats = block(x, residual, *tensors).

    What a backward reads is saved, so that a tensor changed in place between forward and backward
    raises torch's own error. All else may change: of a weight whose gradient alone is wanted, or
    of a frozen one with nothing in front that is not, a backward looks at the sizes. In the place
    of an x that the block in front can form again, what it keeps for that is saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        updates: Updates | None,
        x: Tensor,
        residual: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        found = None
        if (programs := run.written) is not None:
            found = programs.forward(x, tensors, updates)
        results, ctx.together = found or (_forward(run, x, residual, tensors, updates), False)
        out, *rest = results
        mean, saved = rest[: run.means], rest[run.means :]
        stats = [] if ctx.together else saved[: run.norms]
        ctx.run = run
        ctx.reads = run.read(ctx.needs_input_grad[2:])
        read, ctx.unsaved = _apart((x, *tensors), ctx.reads, run)
        origin: Origin | None = None
        again: Sequence[Tensor] = ()
        if run.block.memory != "speed":
            origin = _origin_of(read[0], run)
        if origin is not None:
            origin, again = origin.apart(), origin.tensors
            with torch.enable_grad():
                read[0] = StandIn.apply(x)  # type: ignore[no-untyped-call]
        ctx.origin, ctx.own = origin, len(read) + len(saved) + len(mean)
        ctx.save_for_backward(*read, *saved, *[out for _ in mean], *again)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats)
        return (out, *mean, *stats)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *more: Any) -> tuple[Tensor | None, ...]:
        """The gradients by the fused operator, or by torch where they are to be differentiated."""
        grads = (grad_out, *more[: ctx.run.means])
        if wants_torch(grads):
            if all([grad is None for grad in grads]):
                return (None,) * len(ctx.needs_input_grad)
            return _torch_backward(ctx, grads)
        return _BlockFunction.fused_backward(ctx, grad_out, *more)

    @staticmethod
    def fused_backward(ctx: Any, grad_out: Tensor | None, *more: Any) -> tuple[Tensor | None, ...]:
        """The gradients by the fused operator."""
        run = ctx.run
        given, saved = _given(ctx)
        grad_mean = more[0] if run.means else None
        wanted = ctx.needs_input_grad[2:]
        if grad_out is None:
            if grad_mean is None:
                return (None, None, *[None for _ in wanted])
            grad_out = torch.zeros_like(saved[-1])
        grads = iter(_backward(ctx, grad_out, grad_mean, given, saved, _flags(wanted)))
        return (None, None, *[next(grads) if want else None for want in wanted])


class _Like(NamedTuple):
    """What is known of a tensor in a compiled graph, which would save all that it is given."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _apart(
    given: Sequence[Tensor | None], reads: Sequence[bool], run: Run
) -> tuple[list[Tensor | None], list[Any]]:
    """What a backward reads, and what it does not: each tensor, with its version, in its place."""
    read: list[Tensor | None] = []
    unsaved: list[Any] = []
    compiling = run.plan is None
    for t, reads_it, keep in zip(given, reads, run.keeps, strict=True):
        read.append(t if reads_it else None)
        if reads_it or t is None or (compiling and not keep):
            unsaved.append(None)
        elif compiling:
            unsaved.append(_Like(tuple(t.shape), t.stride(), t.dtype, t.device))
        else:
            unsaved.append((t, t._version))
    return read, unsaved


def _origin_of(x: Tensor | None, run: Run) -> Origin | None:
    """How the block in front forms x again, where x is the whole of what it gave and is read."""
    if x is None or run.plan is None or not saves_plainly():
        return None
    node: Any = x.grad_fn
    if not isinstance(node, _Node) or x.output_nr != 0 or x._version != 0:
        return None
    if x.nbytes < LEAST_BYTES or node.run.plan is None or not forms_again(node.run.block):
        return None
    try:
        everything = node.saved_tensors
    except RuntimeError:  # A backward freed them, or one was changed: nobody may build on them.
        return None
    front, tensors = node.run, [*everything[len(node.reads) : node.own]]
    if front.block.adds_input:
        if node.origin is not None or everything[0] is None:
            return None
        tensors.append(everything[0])
    return Origin(front.block, front.plan, front.programs if node.together else None, tensors)


def _saved(ctx: Any, attached: bool = False) -> tuple[list[Any], Sequence[Tensor]]:
    """What was saved of what the forward was given, x first, and what it kept; an x that is formed
    again is `attached` to the graph where gradients of it are to find their way.
    """
    count, everything = len(ctx.reads), ctx.saved_tensors
    read = [*everything[:count]]
    if ctx.origin is not None:
        x = ctx.origin.output(everything[ctx.own :])
        if attached:
            with torch.enable_grad():
                x = Attached.apply(read[0], x)  # type: ignore[no-untyped-call]
        read[0] = x
    return read, everything[count : ctx.own]


def _given(ctx: Any) -> tuple[list[Tensor | None], Sequence[Tensor]]:
    """What a backward is given, x first, and what its forward kept."""
    given, kept = _saved(ctx)
    for i, keep in enumerate(ctx.run.keeps):
        one = ctx.unsaved[i]
        if not keep or one is None:
            continue
        if isinstance(one, _Like):
            size, stride, dtype, device = one
            given[i] = torch.empty_strided(size, stride, dtype=dtype, device=device)
        else:
            given[i] = one[0]
    return given, kept


def _backward(
    ctx: Any,
    grad_out: Tensor,
    grad_mean: Tensor | None,
    given: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> Sequence[Tensor]:
    """The wanted gradients, in the order of `needs`."""
    run, (x, *tensors) = ctx.run, given
    if ctx.together:
        if (programs := run.written) is not None:
            grads = programs.backward(grad_out, x, tensors, saved, needs)
            if grads is not None:
                return grads  # type: ignore[no-any-return]
        saved = run.programs.views(saved)
    if run.direct:
        units = split_tensors(tensors)
        return run_backward(
            run.block, grad_out, grad_mean, x, units, saved, needs, run.plan, run.fmt
        )
    arguments = (grad_out, grad_mean, x, tensors, saved, run.text, needs)
    return torch.ops.fastres.block_backward(*arguments)  # type: ignore[no-any-return]


def _torch_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients by torch's own operators, through a second forward.

    It reads parameters that a fused backward does not, so these are held to their version here.
    """
    run, (read, kept) = ctx.run, _saved(ctx, attached=True)
    if any([one is not None and one[0]._version != one[1] for one in ctx.unsaved]):
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: a parameter of a fused block, in front of a gradient of its gradients"
        )
    x, *tensors = [t if one is None else one[0] for t, one in zip(read, ctx.unsaved, strict=True)]
    saved = run.programs.views(kept) if ctx.together else kept
    last = run.fmt == torch.channels_last
    wanted = ctx.needs_input_grad[2:]
    return (None, None, *torch_backward(run.block, grads, x, tensors, saved, wanted, last))


_apply = super(torch.autograd.Function, _BlockFunction).apply
#: What stands in the graph for a block.
_Node: Any = _BlockFunction._backward_cls


def run_block(
    run: Run,
    x: Tensor,
    residual: Tensor | None,
    tensors: Sequence[Tensor | None],
    updates: Updates | None,
) -> Sequence[Tensor]:
    """Run a block under autograd.

    Args:
        run: what to compute; `run.block.save` says whether a backward may follow.
        x: [N, C, H, W].
        residual: shape of the output, for the "tensor" shortcut.
        tensors: seven per unit, see `fastres.block.UnitTensors`.
        updates: of the running statistics. Activation checkpointing ends a recomputation where the
            last tensor is saved, so in eager mode they are made before that; a compiler wants
            mutations outside the autograd Function.

    Returns:
        The block's output; with an open end the mean of what it stands for, [N, K], and the stats.
    """
    if run.block.save and not torch.compiler.is_compiling():
        # What autograd's own apply does besides concerns torch.func, which never comes here.
        apply = _apply if run.direct else _BlockFunction.apply
        return apply(run, updates, x, residual, *tensors)  # type: ignore[no-any-return]
    if not run.block.save:
        found = None
        if (programs := run.written) is not None:
            found = programs.forward(x, tensors, updates)
        results = found[0] if found else _forward(run, x, residual, tensors, updates)
        return results[: 1 + run.means + run.norms]
    results = _BlockFunction.apply(run, None, x, residual, *tensors)  # type: ignore[no-untyped-call]
    if updates is not None:
        updates(results[1 + run.means :])
    return results  # type: ignore[no-any-return]
