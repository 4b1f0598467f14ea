"""A backward out of torch's own operators: where it is to be differentiated, or runs by the batch.

The block runs again from what was kept, by `run_stock`, under autograd, but for two things. A
residual that was given is not kept, so the activation behind the sum acts by its mask. And an input
that stands for more than it holds, as the block before left its norm undone, is that value, whose
gradient goes to the input as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.block.layers import Layer
from fastres.block.spec import Block, Unit
from fastres.block.stock import run_stock
from fastres.block.tensors import Saved, UnitTensors, split_tensors
from fastres.kernels import acc_dtype, reference

Grads = Sequence[Tensor | None]


def wants_torch(grads: Grads) -> bool:
    """Whether a backward with these incoming gradients is differentiated, or one of a batch."""
    if torch.compiler.is_compiling():
        return False
    batches = torch._C._functorch
    return torch.is_grad_enabled() or any(
        [
            g is not None and (batches.is_batchedtensor(g) or batches.is_legacy_batchedtensor(g))
            for g in grads
        ]
    )


def torch_backward(
    block: Block,
    grads: Grads,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
    channels_last: bool,
) -> list[Tensor | None]:
    """The gradients of x, the residual and all tensors; None for one that is not wanted.

    Args:
        block: what was run.
        grads: of its output, and with an open end of the output's mean over each image; not all
            of them None.
        x: [N, C, H, W], its input.
        tensors: seven per unit.
        saved: what its forward kept.
        wanted: which of x, the residual and the tensors want a gradient.
        channels_last: layout of the activations.
    """
    kept, create = Saved.unflatten(block, saved), torch.is_grad_enabled()
    grad, *grad_mean = grads
    if block.shortcut == "tensor" and kept.mask is not None and grad is not None:
        grad = masked(grad, kept.mask, channels_last)
    given: dict[int, Tensor] = {0: x} | {i: t for i, t in enumerate(tensors, 2) if t is not None}
    with torch.enable_grad():
        # One may have been computed from another: its gradient must not be the other's too.
        inputs = {i: t.view_as(t) for i, t in given.items() if wanted[i]}
        given |= inputs
        units = split_tensors([given.get(i) for i in range(2, len(tensors) + 2)])
        z = _run_again(block, given[0], units, kept)
        means = [z.mean((2, 3), dtype=acc_dtype(z.dtype)) for _ in grad_mean]
    ends = zip((z, *means), (grad, *grad_mean), strict=True)
    outputs, incoming = zip(*[(end, g) for end, g in ends if g is not None], strict=True)
    found: list[Tensor | None] = [None, grad if wanted[1] else None, *[None for _ in tensors]]
    if inputs:
        results = torch.autograd.grad(outputs, [*inputs.values()], incoming, create_graph=create)
        for i, result in zip(inputs, results, strict=True):
            found[i] = result
    return found


def masked(grad: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    """A gradient [N, C, H, W] behind an activation whose derivative a packed mask holds."""
    return grad.where(reference.unpack_mask(mask, grad.shape, channels_last), 0)


def _run_again(block: Block, x: Tensor, units: Sequence[UnitTensors], kept: Saved) -> Tensor:
    """The output but for what the mask does and the residual adds."""
    layers = [
        _layer(unit, own, stats, x.dtype)
        for unit, own, stats in zip(block.all_units, units, kept.stats, strict=True)
    ]
    stats = kept.stats[0]
    norm = block.units[0].norm
    if norm is not None and norm.source == "given" and stats is not None:
        scale, shift = (row.view(1, -1, 1, 1) for row in stats[3:])
        value = (x.detach() * scale + shift).to(x.dtype)
        x = value + (x - x.detach())
        layers[0] = layers[0]._replace(unit=layers[0].unit._replace(norm=None))
    if block.shortcut == "tensor":
        act = block.act if kept.mask is None else "none"
        block = block._replace(shortcut="none", act=act)
    return run_stock(x, block, layers)


def _layer(unit: Unit, own: UnitTensors, stats: Tensor | None, dtype: torch.dtype) -> Layer:
    """A unit as torch's operators take it: its running statistics are those it was given."""
    factor = None if own.factor is None else own.factor.to(dtype)
    layer = Layer(unit, *own[:4], factor=factor)
    if stats is None or not unit.scaled_norm or unit.batch_stats:
        return layer
    norm = stats.dtype if own.norm_weight is None else own.norm_weight.dtype
    mean, var = stats[:2].to(norm).unbind()
    return layer._replace(running_mean=mean, running_var=var)
