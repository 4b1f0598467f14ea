"""The stateless API: fused convolution + batch norm + activation, and whole residual blocks.

Activations are [N, C, H, W] in float32, bfloat16, float16 or float64, channels_last (fastest) or
contiguous. Parameters of batch norm and its running statistics have the dtype of the activations
or float32. Running statistics are updated in place in training. Whatever cannot be fused runs as
torch's own functions, with the same result and with torch's own errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.block import (
    Block,
    Layer,
    Norm,
    PoolSpec,
    Size,
    Unit,
    add_act,
    current,
    pair,
    run_layers,
)
from fastres.block.check import why_not_tensor
from fastres.kernels import Conv

__all__ = [
    "ConvNorm",
    "PoolSpec",
    "add_relu",
    "bn_act",
    "bn_add_relu",
    "bn_relu",
    "conv_bn_act",
    "conv_bn_relu",
    "residual_block",
]


class ConvNorm(NamedTuple):
    """One convolution with its batch norm and activation, stateless.

    Attributes:
        weight: [K, C/groups, kh, kw], dtype of the activations.
        running_mean: [K] or None; updated in place in training.
        running_var: [K] or None; likewise.
        norm_weight: [K] or None, the batch norm's weight.
        norm_bias: [K] or None, the batch norm's bias.
        bias: [K] or None, the convolution's own bias.
        stride: as in torch.nn.functional.conv2d.
        padding: likewise.
        dilation: likewise.
        groups: likewise.
        training: normalise with batch statistics and update the running ones.
        momentum: factor of the running update; a 0-d tensor avoids a host synchronisation, None
            is the cumulative average, 1/counter.
        eps: added to the variance.
        act: one of `fastres.kernels.activations()`; ignored on the last layer in front of a
            shortcut.
        counter: 0-d integer, nn.BatchNorm2d's num_batches_tracked, or None; incremented in place
            in training.
    """

    weight: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    bias: Tensor | None = None
    stride: Size = 1
    padding: Size = 0
    dilation: Size = 1
    groups: int = 1
    training: bool = False
    momentum: float | Tensor | None = 0.1
    eps: float = 1e-5
    act: str = "relu"
    counter: Tensor | None = None

    @property
    def layer(self) -> Layer:
        """The same as a unit of a block."""
        unit = Unit(self._conv, Norm(self.eps, self._norm_source), self.act)
        return Layer(
            unit, self.weight, self.bias, self.norm_weight, self.norm_bias, self.running_mean,
            self.running_var, None, self.training, self.momentum, self.counter,
        )  # fmt: skip

    @property
    def _conv(self) -> Conv | None:
        if self.weight is None:
            return None
        return Conv(pair(self.stride), pair(self.padding), pair(self.dilation), self.groups)

    @property
    def _norm_source(self) -> str:
        """Whose statistics normalise, as nn.BatchNorm2d decides it."""
        known = self.running_mean is not None and self.running_var is not None
        return "running" if known and not self.training else "batch"


def _block(layers: Sequence[ConvNorm], **more: Any) -> tuple[Block, list[Layer]]:
    """A chain of layers; the activation of the last one is the block's own."""
    *inner, last = [layer.layer for layer in layers]
    inner.append(last._replace(unit=last.unit._replace(act="none")))
    return Block(tuple([layer.unit for layer in inner]), **more), inner


def bn_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    """act(batch_norm(x)), in two passes over x instead of three.

    Args:
        x: [N, C, H, W].
        running_mean: [C] or None; None means batch statistics even outside training.
        running_var: [C] or None.
        weight: [C] or None.
        bias: [C] or None.
        training: normalise with batch statistics, update the running ones.
        momentum: factor of the running update; a 0-d tensor avoids a host synchronisation.
        eps: added to the variance.
        act: "none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "leaky_relu", "hardswish", or a
            name given to `fastres.kernels.register_activation`.

    Returns:
        [N, C, H, W], dtype and layout of x.

    Raises:
        ValueError: for one value per channel in training, as torch.nn.functional.batch_norm; for
            an unknown activation.

    Mirrors torch.nn.functional.batch_norm (Ioffe and Szegedy 2015) followed by the activation.
    """
    layer = ConvNorm(
        None, running_mean, running_var, weight, bias,
        training=training, momentum=momentum, eps=eps, act=act,
    )  # fmt: skip
    return run_layers(x, *_block([layer], act=act))


def bn_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(x)): `bn_act` with "relu", whose docstring has shapes, dtypes and errors."""
    return bn_act(x, running_mean, running_var, weight, bias, training, momentum, eps)


def bn_add_relu(
    x: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(x) + residual): the end of a residual block in one pass.

    Args:
        x: [N, C, H, W].
        residual: [N, C, H, W], dtype of x.
        running_mean: [C] or None, as in `bn_relu`; so are the remaining arguments.
        running_var: [C] or None.
        weight: [C] or None.
        bias: [C] or None.
        training: normalise with batch statistics, update the running ones.
        momentum: factor of the running update.
        eps: added to the variance.

    Returns:
        [N, C, H, W], dtype and layout of x.

    Raises:
        ValueError: for one value per channel in training.
    """
    layer = ConvNorm(
        None, running_mean, running_var, weight, bias,
        training=training, momentum=momentum, eps=eps, act="none",
    )  # fmt: skip
    return run_layers(x, *_block([layer], shortcut="tensor", act="relu"), residual)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual) in one pass, keeping one bit per element for backward.

    Args:
        x: [N, C, H, W].
        residual: [N, C, H, W], dtype and device of x; else torch's own addition runs.

    Returns:
        [N, C, H, W], dtype and layout of x.
    """
    same = (
        why_not_tensor(x) is None
        and why_not_tensor(residual) is None
        and (x.shape, x.dtype, x.device) == (residual.shape, residual.dtype, residual.device)
    )
    if not same:
        return F.relu(x + residual)
    save = torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad)
    return add_act(x, residual, "relu", save, current().backend)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    """act(batch_norm(conv2d(x, weight, bias))); in eval mode the batch norm folds into it.

    Args:
        x: [N, C, H, W].
        weight: [K, C/groups, kh, kw], dtype of x (autocast applies as to torch's conv2d).
        running_mean: [K] or None; None means batch statistics even outside training.
        running_var: [K] or None.
        norm_weight: [K] or None, the batch norm's weight.
        norm_bias: [K] or None, the batch norm's bias.
        bias: [K] or None, the convolution's bias.
        stride: as in torch.nn.functional.conv2d; so are padding, dilation and groups.
        padding: zero padding in pixels.
        dilation: spacing of the kernel's elements.
        groups: number of groups.
        training: normalise with batch statistics, update the running ones.
        momentum: factor of the running update.
        eps: added to the variance.
        act: as in `bn_act`.

    Returns:
        [N, K, H', W'], in the layout torch's conv2d gives.

    Raises:
        ValueError: for one value per channel in training; for an unknown activation.
        RuntimeError: torch's own, for shapes or dtypes that do not fit.
    """
    layer = ConvNorm(
        weight, running_mean, running_var, norm_weight, norm_bias, bias, stride, padding,
        dilation, groups, training, momentum, eps, act,
    )  # fmt: skip
    return run_layers(x, *_block([layer], act=act))


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(conv2d(x, weight, bias))): `conv_bn_act` with "relu"; see there."""
    return conv_bn_act(
        x, weight, running_mean, running_var, norm_weight, norm_bias, bias, stride, padding,
        dilation, groups, training, momentum, eps,
    )  # fmt: skip


def residual_block(
    x: Tensor,
    layers: Sequence[ConvNorm],
    projection: ConvNorm | None = None,
    *,
    pool: PoolSpec | None = None,
    act: str = "relu",
) -> Tensor:
    """act(layers(x) + shortcut(x)): a whole residual block under one autograd node.

    Args:
        x: [N, C, H, W].
        layers: the main path, two layers for a basic block, three for a bottleneck. The last
            one's `act` is not used: the block's own follows the addition.
        projection: convolution and batch norm of the shortcut; None is the identity.
        pool: average pooling in front of the projection (ResNet-D), or None.
        act: after the addition, as in `bn_act`. One whose derivative is not 0 or 1 is applied by
            torch behind the fused block.

    Returns:
        [N, K, H', W'].

    Raises:
        ValueError: for no layers, one value per channel in training, or an unknown activation.
        RuntimeError: torch's own, for shapes or dtypes that do not fit.

    He et al. 2015, "Deep residual learning for image recognition".
    """
    if not layers:
        raise ValueError("layers must hold at least one ConvNorm, got none")
    if any([layer.weight is None for layer in (*layers, projection) if layer is not None]):
        raise ValueError("every layer of a residual block must have a weight, got None")
    block, units = _block(layers, shortcut="input", act=act)
    if projection is not None:
        side = projection._replace(act="none").layer
        block, units = block._replace(projection=side.unit, pool=pool), [*units, side]
    return run_layers(x, block, units)
