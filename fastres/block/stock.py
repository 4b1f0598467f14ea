"""The same block out of torch's own functions: what runs where fastres cannot fuse.

It is also where a wrong input goes, so that the error a user sees is torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from fastres.block.layers import ConvNorm, count_batch
from fastres.block.spec import PoolSpec
from fastres.kernels import activation


def run_stock(
    x: Tensor,
    layers: Sequence[ConvNorm],
    *,
    shortcut: str,
    residual: Tensor | None = None,
    projection: ConvNorm | None = None,
    pool: PoolSpec | None = None,
    act: str = "relu",
) -> Tensor:
    """The block, unfused; arguments as in `fastres.block.call.run_layers`."""
    z = x
    for layer in layers[:-1]:
        z = activate(_conv_norm(z, layer), layer.act)
    z = _conv_norm(z, layers[-1])
    if shortcut == "identity":
        residual = x
    elif projection is not None:
        residual = _conv_norm(x if pool is None else pool.apply(x), projection)
    if residual is not None:
        z = z + residual
    return activate(z, act)


def activate(z: Tensor, act: str) -> Tensor:
    """torch's ReLU, or the formula that an activation was registered with, in the dtype of z."""
    return F.relu(z) if act == "relu" else activation(act).forward(z)


def _conv_norm(x: Tensor, layer: ConvNorm) -> Tensor:
    if layer.weight is not None:
        x = F.conv2d(
            x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    momentum = float(count_batch(layer)) if layer.training else 0.0
    updates = layer.training
    return F.batch_norm(
        x,
        layer.running_mean if updates or not layer.batch_stats else None,
        layer.running_var if updates or not layer.batch_stats else None,
        layer.norm_weight,
        layer.norm_bias,
        layer.batch_stats,
        momentum,
        layer.eps,
    )
