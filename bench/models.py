"""What is measured as a whole: networks by name and single blocks, stock and fused, same weights.

A network's name is looked up in torchvision, then timm, then `fastres.models`;
"timm:resnet50d" names one of them. Nothing is downloaded: weights are random, from a seed.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres.cli.demo import network as digits_network
from fastres.cli.errors import CommandError
from fastres.cli.libraries import library
from fastres.nn import FusedModule, stock

from .shapes import BLOCKS, CONVOLUTIONS, BlockShape, ConvShape

#: Pixels per side of the images that the shapes in `bench.shapes` belong to.
IMAGE_SIZE = 224

#: Parts of a network that are measured alone, by kind and name.
PARTS: dict[str, dict[str, BlockShape] | dict[str, ConvShape]] = {
    "block": BLOCKS, "conv": CONVOLUTIONS,
}  # fmt: skip

#: The network of `fastres demo`, for handwritten digits: one channel, 10 classes.
DIGITS = "digits"


class _StockResNet(fastres.models.ResNet):
    """The network of `fastres.models` with an unfused stem; its blocks are swapped one by one."""

    def _stem(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        return out


# ---------------------------------------------------------------- networks by name


def _torchvision_names() -> Sequence[str]:
    models = library("torchvision.models")
    names: Sequence[str] = models.list_models(module=models)  # those that classify images
    return names


def _own_names() -> Sequence[str]:
    return [name for name in fastres.models.__all__ if name[0].islower()]


#: Library -> (its models' names, what builds one); the first that has a name is taken.
_Builder = Callable[..., nn.Module]
SOURCES: dict[str, tuple[Callable[[], Sequence[str]], _Builder]] = {
    "torchvision": (
        _torchvision_names,
        lambda name, **more: library("torchvision.models").get_model(name, weights=None, **more),
    ),
    "timm": (
        lambda: library("timm").list_models(),
        lambda name, **more: library("timm").create_model(name, pretrained=False, **more),
    ),
    "fastres": (_own_names, lambda name, **more: getattr(fastres.models, name)(**more)),
}


def find(name: str) -> tuple[str, str]:
    """(library, its name for it) of a network.

    Args:
        name: "resnet50", "torchvision:resnet50", "timm:resnet50d" or "fastres:resnet50".

    Raises:
        CommandError: for a name that no library here has, with the nearest ones.
    """
    source, _, plain = name.rpartition(":")
    if source and source not in SOURCES:
        raise CommandError(
            f"--model must be a name or LIBRARY:NAME with LIBRARY one of {', '.join(SOURCES)}, "
            f"got {name!r}"
        )
    known: list[str] = []
    for library_name, names in _names([source] if source else list(SOURCES)):
        if plain in names:
            return library_name, plain
        known += names
    near = difflib.get_close_matches(plain, dict.fromkeys(known), 3, 0.6)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    where = source or ", ".join(SOURCES)
    raise CommandError(f"--model must be the name of a model of {where}, got {name!r}{hint}")


def _names(sources: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """The libraries that are there; one that was named alone has to be."""
    for source in sources:
        try:
            yield source, SOURCES[source][0]()
        except CommandError:
            if len(sources) == 1:
                raise


def network(name: str, fused: bool, **more: Any) -> nn.Module:
    """A network with the weights of seed 0, as its library has it or with fused blocks.

    Args:
        name: as of `find`, or `DIGITS`.
        fused: whether fastres runs its blocks.
        more: for what builds it, num_classes for one.

    Raises:
        CommandError: for a name that is not known.
    """
    if name == DIGITS:
        model = digits_network.build(seed=0)
        if fused:
            fastres.convert(model)
        return model
    source, plain = find(name)
    torch.manual_seed(0)
    model = SOURCES[source][1](plain, **more)
    if source == "fastres":
        return model if fused else _unfused(model)
    if fused:
        fastres.convert(model)
    return model


def _unfused(model: nn.Module) -> nn.Module:
    """A network of `fastres.models` out of torch's own modules."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.__class__ = next(c for c in type(module).__mro__ if c in _STOCK_BLOCKS)
    model.__class__ = _StockResNet
    return model


_STOCK_BLOCKS = (stock.BasicBlock, stock.Bottleneck)


# ---------------------------------------------------------------- subjects


@dataclass(frozen=True)
class Subject:
    """A network or a part of one, and the size of its input.

    Attributes:
        kind: one of `PARTS`; any other is a network.
        name: of the network, or of the part's shape at 224 pixels.
        batch: images.
        size: pixels per side of the image; a part's input is smaller by its own factor.
    """

    kind: str
    name: str
    batch: int
    size: int

    @property
    def part(self) -> bool:
        """Whether it is a part of a network, whose input has a gradient."""
        return self.kind in PARTS

    @property
    def shape(self) -> BlockShape | ConvShape:
        """A part's geometry at this size and batch."""
        shape = PARTS[self.kind][self.name]
        size = max(shape.stride, shape.size * self.size // IMAGE_SIZE)
        return replace(shape, size=size, batch=self.batch)

    @property
    def label(self) -> str:
        """What rows and tables call it."""
        return self.shape.name if self.part else self.name

    @property
    def pixels(self) -> int:
        """Per side of its input."""
        return self.shape.size if self.part else self.size

    def import_library(self) -> None:
        """Import what a network is built from: its memory, up to 160 MB, is no contender's."""
        if not self.part and self.name != DIGITS:
            find(self.name)

    def build(self, fused: bool) -> nn.Module:
        """The module in training mode, on the CPU, with the weights of seed 0."""
        if not self.part:
            return network(self.name, fused).train()
        torch.manual_seed(0)
        shape = self.shape
        if isinstance(shape, ConvShape):
            return _unit(shape, fused).train()
        return _block(fastres.Bottleneck if fused else stock.Bottleneck, shape).train()

    def input(self, seed: int, batch: int | None = None) -> Tensor:
        """A standard normal batch, float32: images are normalised before they come to a network."""
        generator = torch.Generator().manual_seed(seed)
        channels = 1 if self.name == DIGITS else 3
        if self.part:
            channels = self.shape.channels
        return torch.randn(
            batch or self.batch, channels, self.pixels, self.pixels, generator=generator
        )


def _unit(shape: ConvShape, fused: bool) -> nn.Module:
    """The convolution with batch norm and ReLU."""
    geometry = (shape.channels, shape.outputs, shape.kernel, shape.stride, shape.kernel // 2)
    if fused:
        return fastres.nn.ConvBNReLU(*geometry)
    conv, norm = nn.Conv2d(*geometry, bias=False), nn.BatchNorm2d(shape.outputs)
    return nn.Sequential(OrderedDict(conv=conv, bn=norm, relu=nn.ReLU(inplace=True)))


def _block(cls: type[nn.Module], shape: BlockShape) -> nn.Module:
    downsample = None
    if shape.projected:
        downsample = nn.Sequential(
            nn.Conv2d(shape.channels, shape.outputs, 1, shape.stride, bias=False),
            nn.BatchNorm2d(shape.outputs),
        )
    return cls(shape.channels, shape.width, shape.stride, downsample)
