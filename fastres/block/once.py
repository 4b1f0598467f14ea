"""A second backward through a fused operation raises; it is never silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]

_MESSAGE = (
    "fastres: a second backward through a fused block is not implemented; "
    "call fastres.revert(model) where gradients of gradients are needed"
)


def once_differentiable(backward: Backward) -> Backward:
    """`backward` without a graph; where one was asked for, differentiating its result raises.

    torch.autograd.function.once_differentiable attaches the error only where an incoming gradient
    requires one. A gradient penalty starts from a constant, and would contribute nothing.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        asked = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            results = backward(ctx, *grads)
        return _poisoned(results) if asked else results

    return run


def _poisoned(results: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    error = torch._C._functions.DelayedError(_MESSAGE, len(results))  # type: ignore[attr-defined]
    fresh: Any = [None if t is None else t.detach().requires_grad_() for t in results]
    return tuple(error(*fresh))
