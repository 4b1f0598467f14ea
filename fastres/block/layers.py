"""A layer as the functional API takes it: the tensors and settings of convolution + batch norm."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastres.block.spec import UnitSpec
from fastres.kernels import ConvSpec

Size = int | tuple[int, int]


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
    def batch_stats(self) -> bool:
        """Whether the batch's own statistics normalise, as nn.BatchNorm2d decides it."""
        return self.training or self.running_mean is None or self.running_var is None

    @property
    def conv(self) -> ConvSpec | None:
        """Geometry of the convolution, or None for a batch norm alone."""
        if self.weight is None:
            return None
        return ConvSpec(pair(self.stride), pair(self.padding), pair(self.dilation), self.groups)

    @property
    def spec(self) -> UnitSpec:
        """The layer without its tensors."""
        return UnitSpec(self.conv, self.eps, self.batch_stats, self.act)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The tensors that may want a gradient."""
        return self.weight, self.bias, self.norm_weight, self.norm_bias

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The six tensors of `fastres.block.UnitTensors`."""
        running = (None, None) if self.batch_stats else (self.running_mean, self.running_var)
        return (*self.parameters, *running)


def is_size(value: object) -> bool:
    """Whether a setting is a plain int or two of them; torch knows what to do with the rest."""
    if type(value) is int:
        return True
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return type(value[0]) is int and type(value[1]) is int


def pair(value: Size) -> tuple[int, int]:
    """(value, value) for an int, the pair itself else."""
    if isinstance(value, int):
        return (value, value)
    h, w = value
    return (h, w)


def count_batch(layer: ConvNorm) -> float | Tensor:
    """Increment the counter in place, as nn.BatchNorm2d does, and give the running factor.

    The cumulative average's 1/counter stays on the device: no synchronisation.
    """
    if layer.counter is not None:
        layer.counter.add_(1)
    if layer.momentum is not None:
        return layer.momentum
    return 0.0 if layer.counter is None else 1.0 / layer.counter.double()
