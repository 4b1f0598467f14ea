"""What a network cannot but move and compute, layer by layer and level of fusion by level.

The counts are lower bounds: every tensor that a level has to read or write moves once, at the speed
of the memory, and everything else is free. Per pixel and channel of a tensor, in training, with y
the raw output of a convolution, z = act(scale*y + shift), g the gradient that arrives, and x the
block's input; "end" is a block's last convolution together with its projection, if it has one.

Convolutions, at every level: forward reads its input and writes y; the weight gradient reads input
and grad_y; the data gradient reads grad_y and writes grad_x, all of it, and there is none for the
image. A 1x1 convolution with a stride reads only the pixels it uses. Weights move once per batch in
each of the three. The image arrives in float32.

(a) everything separate. Forward: statistics read y; normalising reads y, writes z; ReLU in place
    reads and writes z. Backward: ReLU reads g and z, writes; batch norm reads g and y twice, writes
    grad_y. At the end, forward: the sum reads both branches and writes; ReLU as above. Backward: x
    has two gradients: they are added by a pass of their own, two reads and a write.
(b) Forward: statistics; one pass y -> z. Backward: one pass reads g and y for the sums, one reads
    them again and writes grad_y; the gate follows from y. At the end one pass reads the branches
    and writes out; backward, both passes read g, y of each branch and out's signs, a bit each; the
    second writes grad_y of each branch, and g behind the gate where the shortcut is the identity.
    The data gradient of the block's first convolution reads what is added to it.
(b') statistics come out of the convolution: no pass reads y for them.
(c') convolutions read y in z's place and normalise on the way in: no pass writes z. After the stem
    it is the max pooling that does so. The data gradient above delivers the sums on
    its way out, so it reads y, but no pass does, and writes g behind the gate: the second pass and
    the shortcut find it there. A block's end gets this from the block after it; the last one from
    the global pooling's backward. A norm in front of pooling keeps both of its passes.
(c) both gradients of a convolution form grad_y from g and y on the way in: no pass writes it, and
    each reads y besides.

Inference: (a) has one pass per norm, ReLU and sum; at any other level the norm is folded into the
convolution, and the sum and ReLU are its epilogue, which reads the shortcut.

Not counted: per-channel vectors, tiles' partial sums, the indices of max pooling, and writing the
bits of the signs, 0.7 MB of ResNet-50's 300. Layers outside the blocks and stems that fastres fuses
stay at (a), without sums that no module stands for.

With that ResNet-50 at 224 moves 470.6 / 327.4 / 305.1 / 262.5 / 241.6 MB per image in 16 bits, in
batches of 256 and without its linear layer (0.07 MB). docs/design.md section 6 has 471 / 327 / 306
/ 262 / 242: all but (b') are the same, and there the write of the bits makes up the difference.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastres
from fastres.nn.fused import FusedParts
from fastres.nn.match import Match, Parts
from fastres.nn.stem import FusedStem

#: docs/design.md, section 6; "a" is PyTorch's own way.
LEVELS = ("a", "b", "b'", "c'", "c")

#: What is counted where no batch is given: weights, whose traffic a batch shares.
BATCH = 256

_IMAGE_BYTES = 4
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_KINDS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (nn.Conv2d, "conv"), (nn.Linear, "linear"), (_POOLS, "pool"),
    (nn.AdaptiveAvgPool2d, "global pool"), (nn.BatchNorm2d, "norm"), (nn.ReLU, "act"),
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A module that computes; shapes are without the batch.

    Attributes:
        name: the module's in the model.
        kind: "conv", "linear", "pool", "global pool", "norm" or "act". A norm or activation that
            runs fused with its convolution has no layer of its own.
        in_shape, out_shape: [C, H, W], or [C] of a linear layer.
        flops_forward, flops_backward: per image, a multiply-add counts two; the first convolution
            has no data gradient.
        weights: number of elements.
        strided: whether a 1x1 convolution skips pixels of its input.
        first: whether its input is the image.
        block: the name of the fused block or stem that it is part of, or None.
        role: in the block: "inner", "end" or "projection"; "chain" where no sum follows the block's
            last convolution.
    """

    name: str
    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    flops_forward: int = 0
    flops_backward: int = 0
    weights: int = 0
    strided: bool = False
    first: bool = False
    block: str | None = None
    role: str | None = None

    @property
    def inputs(self) -> int:
        """Elements of its input."""
        return prod(self.in_shape)

    @property
    def outputs(self) -> int:
        """Elements of its output."""
        return prod(self.out_shape)

    @property
    def used(self) -> int:
        """Elements of its input that it reads."""
        return self.in_shape[0] * prod(self.out_shape[1:]) if self.strided else self.inputs


class Operation(NamedTuple):
    """Something that runs on its own: its bytes and its FLOPs, per image."""

    layer: str
    what: str
    bytes: float
    flops: int = 0


# ---------------------------------------------------------------- the walk


def layers(model: nn.Module, image_size: int, image: bool = True) -> list[Layer]:
    """The layers of a network in the order in which they run; nothing is computed or changed.

    Args:
        model: takes images [N, C, H, W]; converted or not, fused blocks of fastres or stock ones.
        image_size: pixels per side.
        image: whether the input is an image; that of a single block is not, and has a gradient.

    Raises:
        ValueError: where the model has no convolution, or cannot take such an image.
    """
    ghost = _ghost(model)
    first = next((m for m in ghost.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"model must have a Conv2d, got a {type(model).__name__} without")
    roles, absorbed = _roles(ghost), {id(part) for part in _absorbed(ghost)}
    shapes = _shapes(ghost, torch.empty(
        1, first.in_channels, image_size, image_size, device="meta", dtype=first.weight.dtype,
    ))  # fmt: skip
    return [
        _layer(name, module, *shape, roles.get(name), image and module is first)
        for name, module, shape in shapes
        if id(module) not in absorbed
    ]


def _ghost(model: nn.Module) -> nn.Module:
    """A converted copy without data, and without hooks, which would keep blocks from fusing."""
    ghost = copy.deepcopy(model).to("meta").eval()
    for module in ghost.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks,
                      module._backward_hooks, module._backward_pre_hooks):  # fmt: skip
            hooks.clear()
    fastres.convert(ghost)
    return ghost


def _fused(ghost: nn.Module) -> Iterator[tuple[str, nn.Module, Match]]:
    for name, module in ghost.named_modules():
        if isinstance(module, FusedParts):
            matched = module.matched()
            if matched is not None:
                yield name, module, matched


def _roles(ghost: nn.Module) -> dict[str, tuple[str, str]]:
    """Name of a convolution -> the fused block it is part of, and its role there."""
    by_weight = {id(m.weight): n for n, m in ghost.named_modules() if isinstance(m, nn.Conv2d)}
    role_of: dict[str, tuple[str, str]] = {}
    for name, _, (block, layers, *_) in _fused(ghost):
        last = "chain" if block.shortcut == "none" else "end"
        roles = ["inner"] * (len(block.units) - 1) + [last, "projection"]
        for layer, role in zip(layers, roles, strict=False):
            if layer.weight is not None:
                role_of[by_weight[id(layer.weight)]] = (name or "model", role)
    return role_of


def _absorbed(ghost: nn.Module) -> Iterator[nn.Module]:
    """Norms and activations that run fused."""
    for _, module, _ in _fused(ghost):
        inside = module.modules()
        if isinstance(module, FusedStem):  # the network itself
            parts = module._parts()
            assert isinstance(parts, Parts)
            inside = iter([parts.end, *[part for steps in parts.units for part in steps[:3]]])
        yield from (m for m in inside if isinstance(m, nn.BatchNorm2d | nn.ReLU))


Shapes = list[tuple[str, nn.Module, tuple[tuple[int, ...], tuple[int, ...]]]]


def _shapes(ghost: nn.Module, image: Tensor) -> Shapes:
    """Every layer that runs, with the shapes of its input and output."""
    seen: Shapes = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            shapes = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
            seen.append((name, module, shapes))

        return hook

    for name, module in ghost.named_modules():
        if _kind(module) is not None:
            module.register_forward_hook(watch(name))
    try:
        with torch.no_grad():
            ghost(image)
    except (RuntimeError, TypeError, ValueError) as error:
        size = f"{image.shape[2]}x{image.shape[3]}"
        raise ValueError(f"model must take an image of {size}, got: {error}") from error
    return seen


def _kind(module: nn.Module) -> str | None:
    return next((kind for types, kind in _KINDS if isinstance(module, types)), None)


def _layer(
    name: str, module: nn.Module, inputs: tuple[int, ...], outputs: tuple[int, ...],
    role: tuple[str, str] | None, first: bool,
) -> Layer:  # fmt: skip
    kind = _kind(module)
    assert kind is not None
    weights = flops = 0
    strided = False
    if isinstance(module, nn.Conv2d | nn.Linear):
        weights = module.weight.numel()
        flops = 2 * weights * prod(outputs[1:])
    if isinstance(module, nn.Conv2d):
        strided = module.kernel_size == (1, 1) and module.stride != (1, 1)
    block, part = role or (None, None)
    return Layer(
        name, kind, inputs, outputs, flops, flops if first else 2 * flops, weights, strided, first,
        block, part,
    )  # fmt: skip


# ---------------------------------------------------------------- what has to move


def operations(
    found: Sequence[Layer], level: str, itemsize: int, training: bool, batch: int = BATCH
) -> list[Operation]:
    """What runs one after the other for an image.

    Args:
        found: what `layers` gave.
        level: one of `LEVELS`, see this module.
        itemsize: bytes of an element of activations and weights.
        training: forward and backward; else forward alone, with running statistics.
        batch: the number of images that share a reading of the weights.

    Raises:
        ValueError: for an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    count = _Training if training else _Inference
    return count(found, LEVELS.index(level), itemsize, batch).run()


def traffic(
    found: Sequence[Layer], level: str, itemsize: int, training: bool, batch: int = BATCH
) -> dict[str, float]:
    """Bytes per image of each layer; the sum is the network's. Arguments as of `operations`."""
    moved = {layer.name: 0.0 for layer in found}
    for one in operations(found, level, itemsize, training, batch):
        moved[one.layer] += one.bytes
    return moved


def bound_ms(
    some: Iterable[Operation], batch: int, bandwidth_gb_s: float, peak_tflop_s: float
) -> float:
    """Milliseconds for a batch in which each operation is as fast as memory or arithmetic allow."""
    seconds = (max(o.bytes / bandwidth_gb_s / 1e9, o.flops / peak_tflop_s / 1e12) for o in some)
    return batch * sum(seconds) * 1e3


class _Count:
    """Adds up the operations of a network; sizes are in elements of `itemsize` bytes."""

    def __init__(self, found: Sequence[Layer], rank: int, itemsize: int, batch: int) -> None:
        self.layers, self.rank, self.itemsize, self.batch = found, rank, itemsize, batch
        self.passes: list[Operation] = []
        # What a convolution reads besides, by layer and direction.
        self.extra: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.blocks: dict[str, list[Layer]] = defaultdict(list)
        for layer in found:
            if layer.block is not None:
                self.blocks[layer.block].append(layer)

    def run(self) -> list[Operation]:
        for name, parts in self.blocks.items():
            self.block(name, parts)
        for layer in self.layers:
            if layer.kind in ("conv", "linear"):
                self.products(layer)
            elif layer.kind == "global pool":
                self.add(layer, "forward", layer.inputs)
            else:
                self.alone(layer)
        return self.passes

    def block(self, name: str, parts: list[Layer]) -> None:
        raise NotImplementedError

    def products(self, layer: Layer) -> None:
        raise NotImplementedError

    def alone(self, layer: Layer) -> None:
        raise NotImplementedError

    def below(self, level: str) -> bool:
        return self.rank < LEVELS.index(level)

    def add(self, layer: Layer, what: str, elements: float, flops: int = 0) -> None:
        self.passes.append(Operation(layer.name, what, elements * self.itemsize, flops))

    def forward(self, layer: Layer) -> None:
        moved = self.read(layer) + layer.outputs + self.weights(layer)
        self.add(layer, "forward", moved + self.extra[layer.name, "forward"], layer.flops_forward)

    def read(self, layer: Layer) -> float:
        """Elements of the input that a convolution reads; the image's are wider."""
        return layer.used * (_IMAGE_BYTES / self.itemsize if layer.first else 1)

    def weights(self, layer: Layer) -> float:
        return layer.weights / self.batch


class _Inference(_Count):
    """Forward alone, with running statistics."""

    products = _Count.forward

    def block(self, name: str, parts: list[Layer]) -> None:
        for layer in parts:
            y = layer.outputs
            if self.below("b"):
                self.add(layer, "normalise", 2 * y)
                if layer.role != "projection":
                    self.add(layer, "activation", 2 * y)
                if layer.role == "end":
                    self.add(layer, "sum", 3 * y)
            elif layer.role == "end":
                self.extra[layer.name, "forward"] += y

    def alone(self, layer: Layer) -> None:
        self.add(layer, "forward", layer.inputs + layer.outputs)


class _Training(_Count):
    """Forward and backward."""

    def block(self, name: str, parts: list[Layer]) -> None:
        main = [layer for layer in parts if layer.role != "projection"]
        for layer, following in zip(main, [*main[1:], None], strict=True):
            if layer.role == "end":
                side = next((p for p in parts if p.role == "projection"), None)
                self.end(main, layer, side)
            elif self.below("b"):
                self.separate(layer)
            else:
                self.inner(layer, following)

    def separate(self, layer: Layer) -> None:
        """Level (a) of a norm and its activation."""
        y = layer.outputs
        self.add(layer, "statistics", y)
        self.add(layer, "normalise", 2 * y)
        self.add(layer, "activation", 2 * y)
        self.add(layer, "activation backward", 3 * y)
        self.add(layer, "norm backward", 5 * y)

    def inner(self, layer: Layer, following: Layer | None) -> None:
        y = layer.outputs
        if self.below("b'"):
            self.add(layer, "statistics", y)
        if self.below("c'") or (following is None and not self.pooled(layer)):
            self.add(layer, "normalise", 2 * y)
        if self.below("c'") or following is None:
            self.add(layer, "sums", 2 * y)
        else:
            self.extra[following.name, "data gradient"] += y
        self.gradient(layer, 3 * y)

    def gradient(self, layer: Layer, apart: float) -> None:
        """grad_y of a layer, by a pass that moves `apart`, or formed where it is consumed."""
        if self.below("c"):
            self.add(layer, "gradient", apart)
            return
        for direction in ("data gradient", "weight gradient"):
            self.extra[layer.name, direction] += layer.outputs

    def end(self, main: list[Layer], last: Layer, side: Layer | None) -> None:
        """A block's end: both branches, their sum and its activation."""
        x, y = main[0].inputs, last.outputs
        branches = y + (side.outputs if side else 0)
        if self.below("b"):
            self.separate_end(main, last, branches)
            return
        signs = y / 8 / self.itemsize
        if self.below("b'"):
            self.add(last, "statistics", branches)
        self.add(last, "normalise and sum", 3 * y)
        self.extra[main[0].name, "data gradient"] += x
        if self.below("c'"):
            self.add(last, "sums", y + branches + signs)
            passed_on = 0 if side else y
            self.add(last, "gradient", y + 2 * branches + signs + passed_on)
            return
        self.sums_from_above(last, branches + signs)
        if self.below("c"):
            self.add(last, "gradient", y + 2 * branches)
            return
        for layer in filter(None, (last, side)):
            self.gradient(layer, 0)

    def separate_end(self, main: list[Layer], last: Layer, branches: int) -> None:
        y = last.outputs
        self.add(last, "statistics", branches)
        self.add(last, "normalise", 2 * branches)
        self.add(last, "sum", 3 * y)
        self.add(last, "activation", 2 * y)
        self.add(last, "activation backward", 3 * y)
        self.add(last, "norm backward", 5 * branches)
        self.add(main[0], "sum of gradients", 3 * main[0].inputs)

    def sums_from_above(self, last: Layer, read: float) -> None:
        """The sums of a block's end come with the gradient that the next block delivers."""
        names = list(self.blocks)
        index = names.index(last.block or "") + 1
        above = self.blocks[names[index]][0] if index < len(names) else None
        if above is not None and above.in_shape == last.out_shape:
            self.extra[above.name, "data gradient"] += read
        else:
            self.add(last, "sums", read)

    def pooled(self, layer: Layer) -> bool:
        """Whether pooling follows, which can normalise on the way in."""
        index = self.layers.index(layer) + 1
        return index < len(self.layers) and self.layers[index].kind == "pool"

    def products(self, layer: Layer) -> None:
        self.forward(layer)
        weights = self.weights(layer)
        moved = {
            "weight gradient": self.read(layer) + layer.outputs + weights,
            "data gradient": layer.inputs + layer.outputs + weights,
        }
        for direction, elements in moved.items():
            if not (layer.first and direction == "data gradient"):
                extra = self.extra[layer.name, direction]
                self.add(layer, direction, elements + extra, layer.flops_forward)

    def alone(self, layer: Layer) -> None:
        """A module outside fused blocks."""
        x, y = layer.inputs, layer.outputs
        if layer.kind == "norm":
            self.add(layer, "forward", 3 * y)
            self.add(layer, "backward", 5 * y)
        else:
            self.add(layer, "forward", x + y)
            self.add(layer, "backward", x + y + (y if layer.kind == "act" else 0))
