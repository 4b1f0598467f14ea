"""What is timed: one step of a block, by eager torch, by fastres, and by its convolutions alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastres
from bench.shapes import BlockShape

Step = Callable[[], object]


CLASSES: dict[str, type[nn.Module]] = {
    "eager": fastres.nn.stock.Bottleneck,
    "fastres": fastres.Bottleneck,
}


def _block(cls: type[nn.Module], shape: BlockShape, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    downsample = None
    if shape.projected:
        downsample = nn.Sequential(
            nn.Conv2d(shape.channels, shape.outputs, 1, shape.stride, bias=False),
            nn.BatchNorm2d(shape.outputs),
        )
    block = cls(shape.channels, shape.width, shape.stride, downsample)
    return block.to(dtype).to(memory_format=torch.channels_last)


def _input(shape: BlockShape, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, dtype=dtype)
    return x.to(memory_format=torch.channels_last)


def training_step(cls: type[nn.Module], shape: BlockShape, dtype: torch.dtype) -> Step:
    """Forward and backward of one block, gradients of x and every parameter."""
    block, x = _block(cls, shape, dtype), _input(shape, dtype).requires_grad_()
    grad = torch.randn_like(block(x).detach())
    wanted = [x, *block.parameters()]

    def step() -> object:
        return torch.autograd.grad(block(x), wanted, grad)

    return step


def inference_step(cls: type[nn.Module], shape: BlockShape, dtype: torch.dtype) -> Step:
    """One block in eval mode, without gradients."""
    block, x = _block(cls, shape, dtype).eval(), _input(shape, dtype)

    def step() -> object:
        with torch.no_grad():
            return block(x)

    return step


def convolutions_step(shape: BlockShape, dtype: torch.dtype) -> Step:
    """The block's convolutions alone, forward and backward, on inputs of the right shapes."""
    block = _block(CLASSES["eager"], shape, dtype)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.update({m: args[0].detach()}))
        for m in convs
    ]
    block(_input(shape, dtype))
    for hook in hooks:
        hook.remove()
    inputs = [(m, seen[m].clone().requires_grad_()) for m in convs]
    grads = [torch.randn_like(m(x).detach()) for m, x in inputs]

    def step() -> object:
        outputs = [m(x) for m, x in inputs]
        return [
            torch.autograd.grad(y, [x, m.weight], g)
            for y, (m, x), g in zip(outputs, inputs, grads, strict=True)
        ]

    return step


def make_step(contender: str, mode: str, shape: BlockShape, dtype: torch.dtype) -> Step:
    """The step that a contender's name stands for."""
    if contender == "convolutions":
        return convolutions_step(shape, dtype)
    make = training_step if mode == "train" else inference_step
    return make(CLASSES[contender], shape, dtype)


def saved_bytes(contender: str, shape: BlockShape, dtype: torch.dtype) -> int:
    """Bytes that one forward keeps for backward, each storage once, parameters left out."""
    block, x = _block(CLASSES[contender], shape, dtype), _input(shape, dtype).requires_grad_()
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = block(x)
    del out
    return sum(storages.values())
