"""The same block out of torch's own functions: what runs where fastres cannot fuse.

It is also where a wrong input goes, so that the error a user sees is torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from fastres.block.layers import Layer, count_batch
from fastres.block.spec import Block
from fastres.kernels import activation


def run_stock(
    x: Tensor, block: Block, layers: Sequence[Layer], residual: Tensor | None = None
) -> Tensor:
    """The block, unfused; arguments as in `fastres.block.call.run_layers`."""
    main = len(block.units)
    z = source = x
    for i, layer in enumerate(layers[:main]):
        z = _unit(z, layer)
        if i == 0 and block.shortcut == "activated":
            source = z
    if block.shortcut in ("input", "activated"):
        residual = source
        if block.projection is not None:
            residual = source if block.pool is None else block.pool.apply(source)
            residual = _unit(residual, layers[main])
    if residual is not None:
        z = z + residual
    z = activate(z, block.act)
    return z if block.max_pool is None else block.max_pool.apply(z)


def activate(z: Tensor, act: str) -> Tensor:
    """torch's ReLU, or the formula that an activation was registered with, in the dtype of z."""
    if act == "none":
        return z
    return F.relu(z) if act == "relu" else activation(act).forward(z)


def _unit(x: Tensor, layer: Layer) -> Tensor:
    unit = layer.unit
    if unit.conv is not None and layer.weight is not None:
        x = F.conv2d(x, layer.weight, layer.bias, *unit.conv)
    if unit.norm is not None:
        x = _batch_norm(x, layer, unit.norm.eps)
    x = activate(x, unit.act)
    return x if layer.factor is None else x * layer.factor


def _batch_norm(x: Tensor, layer: Layer, eps: float) -> Tensor:
    momentum = float(count_batch(layer)) if layer.training else 0.0
    batch = layer.unit.batch_stats
    running = (layer.running_mean, layer.running_var)
    if batch and not layer.training:
        running = (None, None)
    return F.batch_norm(x, *running, layer.norm_weight, layer.norm_bias, batch, momentum, eps)
