"""Fused building blocks: convolution + batch norm + ReLU, and the two ends of a residual block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastres.block import Block, Size, try_layers
from fastres.nn.blocks import FusedModule
from fastres.nn.match import Parts, Steps, norm_only, why_not_now, why_not_state


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
        m = self._modules
        conv, norm, relu = m["conv"], m["bn"], m["relu"]
        assert conv is not None and norm is not None
        return Parts((Steps(conv, norm),), relu, "none")


class BNReLU(nn.BatchNorm2d):
    """relu(batch_norm(x)): nn.BatchNorm2d with a ReLU behind it, in one operation.

    Arguments, parameters, buffers and errors are those of nn.BatchNorm2d. Input and output are
    [N, C, H, W].
    """

    def forward(self, input: Tensor) -> Tensor:
        """relu(super().forward(input))."""
        out = _run(self, input, None)
        return F.relu(super().forward(input)) if out is None else out


class BNAddReLU(nn.BatchNorm2d):
    """relu(batch_norm(x) + residual): the end of a residual block, in one operation.

    Arguments, parameters, buffers and errors are those of nn.BatchNorm2d. Both inputs and the
    output are [N, C, H, W] of one dtype.
    """

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """relu(super().forward(input) + residual)."""
        out = _run(self, input, residual)
        return F.relu(super().forward(input) + residual) if out is None else out


def _run(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """The fused result, or None. The module's own hooks run around its forward, as ever."""
    if not isinstance(x, Tensor) or why_not_now() is not None or why_not_state(norm) is not None:
        return None
    layer, shortcut = norm_only(norm), "none" if residual is None else "tensor"
    return try_layers(x, Block((layer.unit,), shortcut, act="relu"), [layer], residual)
