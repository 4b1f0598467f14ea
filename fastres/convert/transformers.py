"""The residual layers and the stem of transformers' ResNet."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.resnet import modeling_resnet as resnet

from fastres.nn.blocks import FusedModule
from fastres.nn.genuine import Sequential, as_written
from fastres.nn.match import Decline, Parts, Projection, Steps, children_of

#: The classes inside a layer that are not called, and their forward.
_INNER: dict[Any, Any] = {
    cls: as_written(cls, "forward") for cls in (resnet.ResNetConvLayer, resnet.ResNetShortCut)
}


def _unit_of(layer: nn.Module) -> Steps:
    m = children_of(layer)
    return Steps(m["convolution"], m["normalization"], m["activation"])


class _FusedLayer(FusedModule):
    """A residual layer of either kind."""

    _inner: ClassVar[dict[Any, Any]] = _INNER

    def forward(self, hidden_state: Tensor) -> Tensor:
        """As the stock class's, whose argument may be given by this name."""
        return super().forward(hidden_state)

    def _parts(self) -> Parts | Decline:
        m: dict[str, Any] = children_of(self)
        chain, projection = m["layer"], m["shortcut"]
        convs = tuple(chain._modules.values())
        if type(chain) is not Sequential or any([type(c) not in _CONV_LAYERS for c in convs]):
            return Decline(chain, "is not a Sequential of ResNetConvLayer")
        units = tuple([_unit_of(c) for c in convs])
        wrappers: tuple[nn.Module | None, ...] = (chain, *convs)
        if type(projection) is resnet.ResNetShortCut:
            wrappers = (*wrappers, projection)
            inner = children_of(projection)
            projection = Projection(inner["convolution"], inner["normalization"])
        return Parts(units, m["activation"], "input", projection, (), wrappers)


class FusedBasicLayer(_FusedLayer, resnet.ResNetBasicLayer):  # type: ignore[misc]
    """transformers' ResNetBasicLayer, fused."""


class FusedBottleNeckLayer(_FusedLayer, resnet.ResNetBottleNeckLayer):  # type: ignore[misc]
    """transformers' ResNetBottleNeckLayer, fused."""


class FusedConvLayer(FusedModule, resnet.ResNetConvLayer):  # type: ignore[misc]
    """transformers' ResNetConvLayer outside the residual layers, fused."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the stock class's, whose argument may be given by this name."""
        return super().forward(hidden_states)

    def _parts(self) -> Parts:
        unit = _unit_of(self)
        return Parts((unit._replace(act=None),), unit.act, "none")


class FusedEmbeddings(FusedModule, resnet.ResNetEmbeddings):  # type: ignore[misc]
    """transformers' ResNetEmbeddings, the stem with its pooling, fused."""

    _wraps: ClassVar[bool] = True
    _inner: ClassVar[dict[Any, Any]] = {resnet.ResNetConvLayer: _INNER[resnet.ResNetConvLayer]}

    def forward(self, pixel_values: Tensor) -> Tensor:
        """As the stock class's, whose argument may be given by this name."""
        return super().forward(pixel_values)

    def _parts(self) -> Parts | Decline:
        m: dict[str, Any] = children_of(self)
        embedder = m["embedder"]
        if type(embedder) not in _CONV_LAYERS:
            return Decline(embedder, "is not a ResNetConvLayer")
        unit = _unit_of(embedder)
        if getattr(unit.conv, "in_channels", None) != self.num_channels:
            return Decline(embedder, f"takes other images than of {self.num_channels} channels")
        return Parts(
            (unit._replace(act=None),), unit.act, "none", wrappers=(embedder,), max_pool=m["pooler"]
        )


_CONV_LAYERS = (resnet.ResNetConvLayer, FusedConvLayer)

SWAPS: dict[type, type] = {
    resnet.ResNetBasicLayer: FusedBasicLayer,
    resnet.ResNetBottleNeckLayer: FusedBottleNeckLayer,
    resnet.ResNetConvLayer: FusedConvLayer,
    resnet.ResNetEmbeddings: FusedEmbeddings,
}
