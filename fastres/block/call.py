"""Runs layers as one fused block, or as the stock one where that cannot be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.block.eligible import why_not_block
from fastres.block.layers import ConvNorm, count_batch
from fastres.block.op import run_block
from fastres.block.settings import current
from fastres.block.spec import BlockSpec, PoolSpec
from fastres.block.stock import run_stock
from fastres.kernels import activation


def run_layers(
    x: Tensor,
    layers: Sequence[ConvNorm],
    *,
    shortcut: str,
    residual: Tensor | None = None,
    projection: ConvNorm | None = None,
    pool: PoolSpec | None = None,
    act: str = "relu",
) -> Tensor:
    """act(layers(x) + shortcut), and the update of the running statistics.

    Args:
        x: [N, C, H, W].
        layers: the main path.
        shortcut: "none", "identity", "tensor" (then `residual`) or "projection" (`projection`).
        residual: what is added for "tensor", of the output's shape.
        projection: convolution and batch norm of the shortcut.
        pool: average pooling in front of the projection.
        act: after the sum, one of `fastres.kernels.activations()`.

    Raises:
        ValueError: for an unknown activation; the rest is torch's own.
    """
    for name in (act, *[layer.act for layer in layers]):
        activation(name)
    out = try_layers(
        x, layers, shortcut=shortcut, residual=residual, projection=projection, pool=pool, act=act
    )
    if out is not None:
        return out
    return run_stock(
        x, layers, shortcut=shortcut, residual=residual, projection=projection, pool=pool, act=act
    )


def why_not_layers(
    x: Tensor,
    layers: Sequence[ConvNorm],
    *,
    shortcut: str,
    residual: Tensor | None = None,
    projection: ConvNorm | None = None,
    pool: PoolSpec | None = None,
    act: str = "relu",
) -> str | None:
    """Why `run_layers` would take the stock path for these arguments, or None."""
    if isinstance(x, Tensor) and _autocasts(x.device.type):
        x, layers, projection = _autocast(x, layers, projection)
    return why_not_block(x, layers, shortcut, residual, projection, pool, act)


def try_layers(
    x: Tensor,
    layers: Sequence[ConvNorm],
    *,
    shortcut: str,
    residual: Tensor | None = None,
    projection: ConvNorm | None = None,
    pool: PoolSpec | None = None,
    act: str = "relu",
) -> Tensor | None:
    """`run_layers`, but None where it cannot be fused; then nothing was run or updated."""
    if isinstance(x, Tensor) and _autocasts(x.device.type):
        x, layers, projection = _autocast(x, layers, projection)
    if why_not_block(x, layers, shortcut, residual, projection, pool, act) is not None:
        return None
    everything = [*layers] if projection is None else [*layers, projection]
    spec = BlockSpec(
        units=tuple([layer.spec for layer in layers]),
        shortcut=shortcut,
        projection=None if projection is None else projection.spec,
        pool=pool,
        act=act,
        save=_wants_backward(x, residual, everything),
        memory=_memory_mode(x),
        backend=current().backend,
        level=current().level,
    )
    tensors = [t for layer in everything for t in layer.tensors]
    size, main = x.shape, len(layers)

    def update(out: Tensor, stats: Sequence[Tensor]) -> None:
        _update_running(size, everything, stats, main, out)

    return run_block(spec, x, residual, tensors, update)


def _wants_backward(x: Tensor, residual: Tensor | None, layers: Sequence[ConvNorm]) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = [x, residual, *(t for layer in layers for t in layer.parameters)]
    return any([t is not None and t.requires_grad for t in tensors])


def _memory_mode(x: Tensor) -> str:
    """Where a prologue recomputes activations, keeping them would cost a pass over memory.

    So it is on a CPU, where they stay in cache, and with Triton's own convolutions.
    """
    mode = current().memory
    if mode != "auto":
        return mode
    return "balanced" if x.device.type == "cpu" or current().backend == "triton" else "speed"


def _autocasts(device: str) -> bool:
    """Whether autocast is at work on a device; asking that of one without it, as meta, raises."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(
    x: Tensor, layers: Sequence[ConvNorm], projection: ConvNorm | None
) -> tuple[Tensor, Sequence[ConvNorm], ConvNorm | None]:
    """What autocast does to a convolution: its input, weight and bias in the lower precision."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor | None) -> Tensor | None:
        eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible and t is not None else t

    def lower(layer: ConvNorm) -> ConvNorm:
        return layer._replace(weight=cast(layer.weight), bias=cast(layer.bias))

    if layers[0].weight is not None:
        x = x if (lowered := cast(x)) is None else lowered
    projection = None if projection is None else lower(projection)
    return x, [lower(layer) for layer in layers], projection


def _update_running(
    shape: Sequence[int],
    layers: Sequence[ConvNorm],
    stats: Sequence[Tensor],
    main: int,
    out: Tensor,
) -> None:
    """running = (1 - momentum)*running + momentum*batch, with the unbiased variance, in place."""
    if not any([layer.training for layer in layers]):
        return
    size: tuple[int, ...] = tuple(shape[2:])
    updates: list[tuple[Tensor, Tensor, float | Tensor, float]] = []
    with torch.no_grad():
        for i, (layer, s) in enumerate(zip(layers, stats, strict=True)):
            if i >= main:
                size = tuple(out.shape[2:])
            elif layer.weight is not None and (conv := layer.conv) is not None:
                size = conv.output_size(size, layer.weight.shape[2:])
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
