"""Fused building blocks: convolution + batch norm + ReLU, and the two ends of a residual block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastres.block import Block, Size, try_layers
from fastres.nn.blocks import FusedModule
from fastres.nn.match import (
    Decline,
    Parts,
    Steps,
    activation_of,
    children_of,
    layer_of,
    why_not_now,
)


class _ConvBNReLU(nn.Module):
    """The stock module: `conv`, `bn` and `relu`, one after the other."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn(self.conv(x)))
        return out


class ConvBNReLU(FusedModule, _ConvBNReLU):
    """relu(bn(conv(x))) as one fused operation; in eval mode the batch norm folds into it.

    Args:
        in_channels: as in nn.Conv2d, and so are the next six.
        out_channels: channels of the output.
        kernel_size: of the convolution.
        stride: of the convolution.
        padding: zeros around the input.
        dilation: spacing of the kernel's elements.
        groups: number of groups.
        bias: whether the convolution has a bias of its own; batch norm makes it superfluous.
        eps: as in nn.BatchNorm2d.
        momentum: as in nn.BatchNorm2d; None is the cumulative average.

    Input [N, in_channels, H, W], output [N, out_channels, H', W']; children `conv`, `bn`, `relu`.
    Raises what nn.Conv2d and nn.BatchNorm2d raise.
    """

    def _parts(self) -> Parts:
        m = children_of(self)
        return Parts((Steps(m["conv"], m["bn"]),), m["relu"], "none")


class _NormReLU(nn.Module):
    """A batch norm `bn` with what follows it up to a ReLU `relu`.

    It contains the norm and is none: tools that freeze, fold or synchronise each batch norm of a
    model act on `bn`, and leave the rest.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(
            num_features, eps, momentum, affine, track_running_stats, device, dtype
        )
        self.relu = nn.ReLU(inplace=True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes the entries of an nn.BatchNorm2d in its place, too: they are the ones of `bn`."""
        for name in [*self.bn._parameters, *self.bn._buffers]:
            if prefix + name in state_dict:
                state_dict[f"{prefix}bn.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class BNReLU(_NormReLU):
    """relu(batch_norm(x)) in one operation.

    Arguments and errors are those of nn.BatchNorm2d, which is the child `bn`; a state dict of one
    loads as well. Input and output are [N, C, H, W].
    """

    def forward(self, input: Tensor) -> Tensor:
        """relu(bn(input))."""
        out = _run(self, input, None)
        if out is None:
            out = self.relu(self.bn(input))
        return out


class BNAddReLU(_NormReLU):
    """relu(batch_norm(x) + residual), the end of a residual block, in one operation.

    Arguments and errors are those of nn.BatchNorm2d, which is the child `bn`; a state dict of one
    loads as well. Both inputs and the output are [N, C, H, W] of one dtype.
    """

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """relu(bn(input) + residual)."""
        out = _run(self, input, residual)
        if out is None:
            out = self.relu(self.bn(input) + residual)
        return out


def _run(module: _NormReLU, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """The fused result, or None. The module's own hooks run around its forward, as ever."""
    if not isinstance(x, Tensor) or why_not_now() is not None:
        return None
    children = children_of(module)
    if not children.keys() >= {"bn", "relu"}:
        return None
    layer, act = layer_of(Steps(None, children["bn"])), activation_of(children["relu"])
    if isinstance(layer, Decline) or isinstance(act, Decline):
        return None
    if layer.unit.norm is None or layer.unit.act != "none":
        return None
    shortcut = "none" if residual is None else "tensor"
    return try_layers(x, Block((layer.unit,), shortcut, act=act), [layer], residual)
