"""Runs layers as one fused block, or as the stock one where that cannot be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.block.check import why_not_block
from fastres.block.layers import Layer, count_batch
from fastres.block.op import run_block
from fastres.block.settings import current
from fastres.block.spec import Block
from fastres.block.stock import activate, run_stock
from fastres.block.tensors import identity_stats
from fastres.kernels import activation


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
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        x, layers = _autocast(x, layers)
    return why_not_block(x, _without_late_activation(block)[0], layers, residual)


def try_layers(
    x: Tensor, block: Block, layers: Sequence[Layer], residual: Tensor | None = None
) -> Tensor | None:
    """`run_layers`, but None where it cannot be fused; then nothing was run or updated."""
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        x, layers = _autocast(x, layers)
    block, late = _without_late_activation(block)
    if why_not_block(x, block, layers, residual) is not None:
        return None
    out, _ = _run(x, block, layers, residual)
    return out if late == "none" else activate(out, late)


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
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        x, layers = _autocast(x, layers)
    block = block._replace(open_end=True)
    if why_not_block(x, block, layers) is not None:
        return None
    out, (mean, *stats) = _run(x, block, layers, None)
    known = stats[-1] if block.units[-1].norm is not None else identity_stats(out)
    return out, known, mean


def _without_late_activation(block: Block) -> tuple[Block, str]:
    """The block, and the activation that torch has to apply behind it: one that follows a sum and
    whose derivative is not 0 or 1 would need the sum itself kept.
    """
    late = block.act
    shortcut = block.shortcut != "none" or not block.simple_end
    if late == "none" or not shortcut or activation(late).gate is not None:
        return block, "none"
    return block._replace(act="none"), late


def _run(
    x: Tensor, block: Block, layers: Sequence[Layer], residual: Tensor | None
) -> tuple[Tensor, Sequence[Tensor]]:
    settings = current()
    block = block._replace(
        save=_wants_backward(x, residual, layers),
        memory=_memory_mode(x),
        backend=settings.backend,
        level=settings.level,
    )
    tensors = [t for layer in layers for t in layer.tensors]
    size, main = x.shape, len(block.units)
    updated = [layer for layer in layers if layer.unit.norm is not None]

    def update(out: Tensor, stats: Sequence[Tensor]) -> None:
        if any([layer.training for layer in updated]):
            _update_running(size, layers, stats, main, out)

    return run_block(block, x, residual, tensors, update)


def _wants_backward(x: Tensor, residual: Tensor | None, layers: Sequence[Layer]) -> bool:
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


def _autocast(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, Sequence[Layer]]:
    """What autocast does to a convolution: its input, weight and bias in the lower precision."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor | None) -> Tensor | None:
        eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible and t is not None else t

    if layers[0].weight is not None:
        x = x if (lowered := cast(x)) is None else lowered
    return x, [layer._replace(weight=cast(layer.weight), bias=cast(layer.bias)) for layer in layers]


def _update_running(
    shape: Sequence[int],
    layers: Sequence[Layer],
    stats: Sequence[Tensor],
    main: int,
    out: Tensor,
) -> None:
    """running = (1 - momentum)*running + momentum*batch, with the unbiased variance, in place."""
    size: tuple[int, ...] = tuple(shape[2:])
    updates: list[tuple[Tensor, Tensor, float | Tensor, float]] = []
    known = iter(stats)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            if i >= main:
                size = tuple(out.shape[2:])
            elif layer.weight is not None and (conv := layer.unit.conv) is not None:
                size = conv.output_size(size, layer.weight.shape[2:])
            if layer.unit.norm is None:
                continue
            s = next(known)
            if not layer.training:
                continue
            momentum = count_batch(layer)
            if layer.running_mean is None or layer.running_var is None:
                continue
            count = shape[0] * size[0] * size[1]
            updates.append((layer.running_mean, s[0], momentum, 1.0))
            updates.append((layer.running_var, s[1], momentum, count / (count - 1)))
        _blend(updates)


def _blend(updates: Sequence[tuple[Tensor, Tensor, float | Tensor, float]]) -> None:
    """running = (1 - momentum)*running + momentum*factor*batch for each of `updates`.

    A block's batch norms nearly always share dtype and momentum; then three calls do them all.
    """
    momenta = {m for _, _, m, _ in updates if not isinstance(m, Tensor)}
    plain = [not isinstance(m, Tensor) and r.dtype == b.dtype for r, b, m, _ in updates]
    distinct = len({id(r) for r, _, _, _ in updates}) == len(updates)  # a norm may be shared
    if distinct and all(plain) and len(momenta) == 1:
        momentum = momenta.pop()
        running = [r for r, _, _, _ in updates]
        scaled = torch._foreach_mul([b for _, b, _, _ in updates], [f for _, _, _, f in updates])
        torch._foreach_mul_(running, 1 - momentum)
        torch._foreach_add_(running, scaled, alpha=momentum)
        return
    for one, batch, factor, unbiased in updates:
        one.copy_(one.to(batch.dtype) * (1 - factor) + batch * unbiased * factor)
