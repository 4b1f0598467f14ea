"""Runs layers as one fused block, or as the stock one where that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.block.backward import needs_of, needs_once
from fastres.block.check import why_not_block
from fastres.block.flops import register_formulas
from fastres.block.forward import plan_of
from fastres.block.layers import Layer
from fastres.block.op import Run, run_block
from fastres.block.plan import context_of, pools_within
from fastres.block.running import Updates
from fastres.block.settings import current
from fastres.block.spec import Block
from fastres.block.stock import activate, run_stock
from fastres.block.tensors import identity_stats, output_shapes
from fastres.kernels import MaxPool, activation, memory_format_of


class Call(NamedTuple):
    """A block that was found able to run on certain inputs, with all that was found out.

    Attributes:
        run: what is run.
        late: activation that torch applies behind it, or "none".
        pool: max pooling that torch applies behind it, or None.
        tensors: seven per unit, see `fastres.block.UnitTensors`.
        updates: of the running statistics, or None.
    """

    run: Run
    late: str
    pool: MaxPool | None
    tensors: list[Tensor | None]
    updates: Updates | None

    def with_programs(self, device: torch.device) -> Call:
        """The same, to be kept for later calls: then kernel calls are written down and kept too."""
        return self._replace(run=self.run.with_programs(device))

    def on(self, layers: Sequence[Layer]) -> Call:
        """The same on the tensors of layers that are alike."""
        return self._replace(tensors=[t for layer in layers for t in layer.tensors])

    def without_tensors(self, layers: Sequence[Layer]) -> Call:
        """The same to be kept where its tensors are not: those of `layers` alone are updated."""
        updates = None if self.updates is None else self.updates._replace(layers=layers)
        return self._replace(tensors=[], updates=updates)


def run_layers(
    x: Tensor, block: Block, layers: Sequence[Layer], residual: Tensor | None = None
) -> Tensor:
    """What a block computes, and the update of the running statistics.

    Args:
        x: [N, C, H, W].
        block: its specification; what concerns the run (save, memory, backend, level) is set here.
        layers: the units of the main path, and the projection behind them, with their tensors.
        residual: what is added for the shortcut "tensor", of the output's shape.

    Raises:
        ValueError: for an unknown activation; the rest is torch's own.
    """
    for name in (block.act, *[unit.act for unit in block.all_units]):
        activation(name)
    out = try_layers(x, block, layers, residual)
    return run_stock(x, block, layers, residual) if out is None else out


def why_not_layers(
    x: Tensor, block: Block, layers: Sequence[Layer], residual: Tensor | None = None
) -> str | None:
    """Why `run_layers` would take the stock path for these arguments, or None."""
    if isinstance(x, Tensor) and autocasts(x.device.type):
        x, layers = autocast(x, layers)
    return why_not_block(x, _without_late_activation(block)[0], layers, residual)


def try_layers(
    x: Tensor, block: Block, layers: Sequence[Layer], residual: Tensor | None = None
) -> Tensor | None:
    """`run_layers`, but None where it cannot be fused; then nothing was run or updated."""
    if isinstance(x, Tensor) and autocasts(x.device.type):
        x, layers = autocast(x, layers)
    call = prepare(x, block, layers, residual)
    return None if call is None else execute(call, x, residual)


def run_open(
    x: Tensor, block: Block, layers: Sequence[Layer]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The block without its last normalisation, or None where it cannot be fused.

    Returns:
        (raw output [N, K, H, W], its statistics [5, K], the mean of what it would be, [N, K]).
        Without a norm the statistics leave the raw output as it is.
        Only a block whose first unit is given these statistics may read the raw output: its
        gradient is that of what it stands for.
    """
    if isinstance(x, Tensor) and autocasts(x.device.type):
        x, layers = autocast(x, layers)
    call = prepare(x, block._replace(open_end=True), layers)
    if call is None:
        return None
    out, mean, *stats = run_block(call.run, x, None, call.tensors, call.updates)
    known = stats[-1] if block.units[-1].norm is not None else identity_stats(out)
    return out, known, mean


def prepare(
    x: Tensor, block: Block, layers: Sequence[Layer], residual: Tensor | None = None
) -> Call | None:
    """How to run a block on these layers and an x that is alike, or None where it cannot be."""
    block, late = _without_late_activation(block)
    if why_not_block(x, block, layers, residual) is not None:
        return None
    settings, pool = current(), block.max_pool
    block = block._replace(
        save=wants_backward(x, residual, layers),
        memory=_memory_mode(x),
        backend=settings.backend,
        level=settings.level,
    )
    if block.save:
        block = _spared(block, x, residual, layers)
    weights = [layer.weight for layer in layers]
    if pool is not None and not _pools_within(block, x, weights):
        block = block._replace(max_pool=None)
    shapes = output_shapes(block, x.shape, [None if w is None else (*w.shape,) for w in weights])
    counts = tuple([n * h * w for n, _, h, w in shapes])
    plan = None
    if not torch.compiler.is_compiling():
        register_formulas()
        plan = plan_of(block, x, weights)
    run = Run.of(block, plan, memory_format_of(x, weights))
    tensors = [t for layer in layers for t in layer.tensors]
    late_pool = None if block.max_pool is not None else pool
    return Call(run, late, late_pool, tensors, Updates.of(layers, counts, settings.backend))


def _spared(block: Block, x: Tensor, residual: Tensor | None, layers: Sequence[Layer]) -> Block:
    """The block, keeping what the gradients that are wanted now are computed from."""
    tensors = [x, residual, *[t for layer in layers for t in layer.parameters]]
    flags = tuple([t is not None and t.requires_grad for t in tensors])
    needs = needs_of if torch.compiler.is_compiling() else needs_once
    unread_values = needs(block, flags).unread_values
    block = block._replace(unread_values=unread_values)
    return block._replace(unread=needs(block, flags).unread)


def execute(call: Call, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Run a block that was prepared for these inputs, and update its running statistics."""
    out = run_block(call.run, x, residual, call.tensors, call.updates)[0]
    out = out if call.late == "none" else activate(out, call.late)
    return out if call.pool is None else call.pool.apply(out)


def _pools_within(block: Block, x: Tensor, weights: Sequence[Tensor | None]) -> bool:
    """Whether the block itself pools: what a compiler sees must not depend on what is registered.

    Whatever it decides, the operators can run.
    """
    last = memory_format_of(x, weights) == torch.channels_last
    if torch.compiler.is_compiling():
        return x.device.type == "cpu" and last and block.backend in ("auto", "cpu")
    return pools_within(block, context_of(x, weights, last))


def _without_late_activation(block: Block) -> tuple[Block, str]:
    """The block, and the activation that torch has to apply behind it: one that follows a sum and
    whose derivative is not 0 or 1 would need the sum itself kept.
    """
    late = block.act
    shortcut = block.shortcut != "none" or not block.simple_end
    if late == "none" or not shortcut or activation(late).gate is not None:
        return block, "none"
    return block._replace(act="none"), late


def wants_backward(x: Tensor, residual: Tensor | None, layers: Sequence[Layer]) -> bool:
    """Whether autograd would want a gradient of anything."""
    if not torch.is_grad_enabled():
        return False
    tensors = [x, residual, *[t for layer in layers for t in layer.parameters]]
    return any([t is not None and t.requires_grad for t in tensors])


def _memory_mode(x: Tensor) -> str:
    """Where a prologue recomputes activations, keeping them would cost a pass over memory.

    So it is on a CPU, where they stay in cache, and with Triton's own convolutions.
    """
    mode = current().memory
    if mode != "auto":
        return mode
    return "balanced" if x.device.type == "cpu" or current().backend == "triton" else "speed"


def autocasts(device: str) -> bool:
    """Whether autocast is at work on a device; asking that of one without it, as meta, raises."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, Sequence[Layer]]:
    """What autocast does to a convolution: its input, weight and bias in the lower precision."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor | None) -> Tensor | None:
        eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible and t is not None else t

    if layers[0].weight is not None:
        x = x if (lowered := cast(x)) is None else lowered
    return x, [layer._replace(weight=cast(layer.weight), bias=cast(layer.bias)) for layer in layers]
