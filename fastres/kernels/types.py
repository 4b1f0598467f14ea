"""Types that travel between the engine and the implementations of primitives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: The most taps of a window of max pooling: an argmax is a byte for each output.
MOST_TAPS = 255

#: Rows of a `stats` tensor, [5, C] in the accumulation dtype.
STATS_ROWS = ("mean", "var", "invstd", "scale", "shift")


class Conv(NamedTuple):
    """Geometry of a 2-d convolution, in torch's terms (zero padding)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Spatial size (H, W) of the output for an input of spatial size `size`."""
        (sh, sw), (ph, pw), (dh, dw), _ = self
        h = (size[0] + 2 * ph - dh * (kernel[0] - 1) - 1) // sh + 1
        w = (size[1] + 2 * pw - dw * (kernel[1] - 1) - 1) // sw + 1
        return h, w

    def is_pointwise(self, kernel: Sequence[int]) -> bool:
        """True for a 1x1 convolution that is one matrix product: stride 1, no padding."""
        return (
            tuple(kernel) == (1, 1)
            and self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
        )


class MaxPool(NamedTuple):
    """Geometry of 2-d max pooling, in torch's terms: padding is never the maximum.

    A tap is a position in the window, counted row by row: argmax holds one as uint8.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def apply(self, z: Tensor) -> Tensor:
        """z [N, C, H, W], pooled."""
        return F.max_pool2d(z, *self)

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Spatial size (H, W) of the output for an input of spatial size `size`."""
        h, w = [self._outputs(axis, size[axis]) for axis in (0, 1)]
        return h, w

    def why_not(self, size: Sequence[int]) -> str | None:
        """Why kernels do not pool an input of spatial size `size`, or None.

        Wrong settings are among the reasons: torch says what is wrong with them.
        """
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            return "kernel, stride and dilation must be positive, padding must not be negative"
        if self.kernel[0] * self.kernel[1] > MOST_TAPS:
            return f"the window must have at most {MOST_TAPS} taps, got {list(self.kernel)}"
        for axis in (0, 1):
            if self.padding[axis] > ((self.kernel[axis] - 1) * self.dilation[axis] + 1) // 2:
                return "the padding must be at most half of the window"
            if self._outputs(axis, size[axis]) < 1:
                return f"there is no window in {list(size)}"
            if self.dilation[axis] > 1 and self._misses(axis, size[axis]):
                return "a window holds nothing but padding"
        return None

    def _outputs(self, axis: int, size: int) -> int:
        kernel, stride, padding, dilation, ceil_mode = self
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        rest = size + 2 * padding[axis] - reach + (stride[axis] - 1 if ceil_mode else 0)
        count = rest // stride[axis] + 1
        # The last window must begin in the input or in the padding in front of it.
        outside = ceil_mode and (count - 1) * stride[axis] >= size + padding[axis]
        return count - 1 if outside else count

    def _misses(self, axis: int, size: int) -> bool:
        """Whether there is a window without a tap in the input."""
        kernel, stride, padding, dilation = [one[axis] for one in self[:4]]
        taps = range(-padding, kernel * dilation - padding, dilation)
        starts = [window * stride for window in range(self._outputs(axis, size))]
        return any([all([not 0 <= start + tap < size for tap in taps]) for start in starts])


class Prologue(NamedTuple):
    """What is still to be applied to a raw tensor: act(scale*x + shift), with stats' last rows."""

    stats: Tensor
    act: str


class Branch(NamedTuple):
    """One normalised branch of a block end: its raw convolution output and its statistics."""

    y: Tensor | None
    stats: Tensor


class Gate(NamedTuple):
    """How a backward primitive knows the derivative of the activation.

    kind "none": g = grad_out. "mask": packed bits in `tensor`. "affine": recomputed from the
    first branch's own y and stats, rounded as the forward rounded it. "out": the activation's
    output in `tensor`.
    """

    kind: str
    tensor: Tensor | None = None
    act: str = "relu"

    @property
    def applied(self) -> str:
        """The activation whose derivative the gate applies; "none" for one that stands open."""
        return "none" if self.kind == "none" else self.act

    def images(self, start: int, stop: int, per_image: int) -> Gate:
        """The gate of images start..stop; `per_image` is the number of mask rows per image."""
        if self.tensor is None:
            return self
        if self.kind == "mask":
            return self._replace(tensor=self.tensor[start * per_image : stop * per_image])
        return self._replace(tensor=self.tensor[start:stop])


class Gated(NamedTuple):
    """A residual's gradient that was not formed yet: g = gate(grad_out)."""

    grad_out: Tensor
    gate: Gate


class PendingGrad(NamedTuple):
    """A gradient that was not formed yet: grad_y = A*g + B*y + C with g = gate(grad_out).

    `values` is the number of values per channel behind batch statistics, 0 where running
    statistics were used (then B = C = 0). `sums` are the reduced (sum_g, sum_gx...) rows. `value`
    is grad_y where it was formed already.
    """

    grad_out: Tensor
    gate: Gate
    branch: Branch
    sums: Tensor
    values: int
    value: Tensor | None = None


class RunningUpdate(NamedTuple):
    """A batch norm's running statistics, and the batch that they are to take in.

    Attributes:
        stats: [5, C], float32 or float64: the batch's mean and biased variance in its first rows.
        running_mean: [C] or None; any floating dtype, any stride.
        running_var: [C] or None; likewise.
        counter: 0-d int64, nn.BatchNorm2d's num_batches_tracked, or None.
        momentum: the factor; None is the cumulative average, 1/counter after its increment, and
            0 without a counter. A 0-d tensor is for the formulas alone.
        count: values per channel; the running variance takes in the unbiased one.
    """

    stats: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    counter: Tensor | None
    momentum: float | Tensor | None
    count: int  # type: ignore[assignment]  # a tuple has a method of that name


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and arithmetic use for activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(t: Tensor) -> bool:
    """Whether the strides of a [N, C, H, W] tensor say channels_last, by torch's own rule.

    Mirrors c10's is_channels_last_strides_2d: of the layouts that are ambiguous, with C = 1 or
    H = W = 1, those count as channels_last whose strides were made that way.
    """
    if t.dim() != 4:
        return False
    (n, c, h, w), (of_n, of_c, of_h, of_w) = t.shape, t.stride()
    if of_c == 0:
        return False
    least = 0
    for size, stride in ((c, of_c), (w, of_w), (h, of_h)):
        if size == 0 or stride < least:
            return False
        least = stride * size if size > 1 else stride
    return n != 0 and of_n >= least and least != of_c


def memory_format_of(x: Tensor, weights: Sequence[Tensor | None] = ()) -> torch.memory_format:
    """The layout a convolution gives its output: channels_last where the input or a weight is."""
    if is_channels_last(x) or any(w is not None and is_channels_last(w) for w in weights):
        return torch.channels_last
    return torch.contiguous_format


def dense(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`t` dense in that layout, with the strides torch gives a new tensor of that layout.

    Copies only where the memory order differs. With C = 1 or H = W = 1 both layouts are the same
    memory; then the strides alone are rewritten, so that `is_channels_last` answers for the block
    as a whole.
    """
    t = t.contiguous(memory_format=memory_format)
    _, c, h, w = t.shape
    if memory_format == torch.channels_last:
        strides = (h * w * c, 1, w * c, c)
    else:
        strides = (c * h * w, h * w, w, 1)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def mask_shape(shape: Sequence[int], channels_last: bool) -> tuple[int, int]:
    """Shape of the packed mask of a [N, C, H, W] activation: rows padded to whole bytes.

    A row holds the channels of one pixel in channels_last, the pixels of one channel else.
    """
    n, c, h, w = shape
    rows, inner = (n * h * w, c) if channels_last else (n * c, h * w)
    return rows, (inner + 7) // 8
