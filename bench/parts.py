"""A network's blocks one by one: what each takes, on the activation that it gets there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .contenders import Job
from .measure import Clock

WARM_UPS, ROUNDS = 2, 7


def block_times(job: Job, names: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of each block's forward and, in training, backward pass.

    Args:
        job: of a network.
        names: of the blocks in it.
    """
    module, clock = job.module(), Clock(job.device)
    inputs = _inputs(job, module, names)
    layers = {}
    for name in names:
        step = _step(job, module.get_submodule(name), inputs.pop(name))
        times = [clock.milliseconds(step) for _ in range(WARM_UPS + ROUNDS)]
        layers[name] = statistics.median(times[WARM_UPS:])
    return layers


def _inputs(job: Job, module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """What the blocks get in one forward pass."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].detach().clone()

        return hook

    hooks = [module.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    with torch.no_grad(), job.autocast():
        module(job.place(job.subject.input(0)))
    for handle in hooks:
        handle.remove()
    return seen


def _step(job: Job, block: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward without gradients, or forward and backward to the input and all parameters."""
    if job.mode == "infer":

        def forward() -> object:
            with torch.no_grad(), job.autocast():
                return block(x)

        return forward
    x.requires_grad_()
    with job.autocast():
        grad = torch.randn_like(block(x))
    wanted = [x, *block.parameters()]

    def both() -> object:
        with job.autocast():
            out = block(x)
        return torch.autograd.grad(out, wanted, grad)

    return both
