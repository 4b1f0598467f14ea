"""Layer: a unit with its tensors, as modules and the functional API hand them over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastres.block.spec import Unit

Size = int | tuple[int, int]


class Layer(NamedTuple):
    """A unit of a block with its tensors.

    Attributes:
        unit: what it computes.
        weight: [K, C/groups, kh, kw], dtype of the activations, or None without a convolution.
        bias: [K] or None, the convolution's own bias.
        norm_weight: [K] or None, the batch norm's weight.
        norm_bias: [K] or None, the batch norm's bias.
        running_mean: [K] or None; updated in place in training. Statistics [5, K] where they are
            given.
        running_var: [K] or None; likewise.
        factor: [N, K or 1, 1, 1] or [N, K, H, W], where the unit scales.
        training: whether the running statistics are updated.
        momentum: factor of the running update; a 0-d tensor avoids a host synchronisation, None
            is the cumulative average, 1/counter.
        counter: 0-d integer, nn.BatchNorm2d's num_batches_tracked, or None; incremented in place
            in training.
        promotes: whether an x of lower precision than the norm's tensors comes out in theirs.
    """

    unit: Unit
    weight: Tensor | None = None
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    factor: Tensor | None = None
    training: bool = False
    momentum: float | Tensor | None = 0.1
    counter: Tensor | None = None
    promotes: bool = False

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The tensors that may want a gradient."""
        return self.weight, self.bias, self.norm_weight, self.norm_bias, self.factor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The seven tensors of `fastres.block.UnitTensors`."""
        running = (self.running_mean, self.running_var)
        if self.unit.norm is None or self.unit.norm.source == "batch":
            running = (None, None)
        return (*self[1:5], *running, self.factor)


def is_size(value: object) -> bool:
    """Whether a setting is a plain int or two of them; torch knows what to do with the rest."""
    if type(value) is int:
        return True
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return type(value[0]) is int and type(value[1]) is int


def pair(value: Size | Sequence[int]) -> tuple[int, int]:
    """(value, value) for an int, the pair itself else; what is neither stays what it is."""
    if type(value) is int:
        return (value, value)
    return tuple(value) if is_size(value) else value  # type: ignore[arg-type, return-value]


def count_batch(layer: Layer) -> float | Tensor:
    """Increment the counter in place, as nn.BatchNorm2d does, and give the running factor.

    The cumulative average's 1/counter stays on the device: no synchronisation.
    """
    if layer.counter is not None:
        layer.counter.add_(1)
    if layer.momentum is not None:
        return layer.momentum
    return 0.0 if layer.counter is None else 1.0 / layer.counter.double()
