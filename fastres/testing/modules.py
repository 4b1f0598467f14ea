"""Holds a fused module to a stock one: output, every gradient, every buffer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastres.testing.compare import assert_parity

#: Values per channel from which the channel's largest one is a measure of its size.
_MANY = 64

#: How stock torch is run besides as given, for its own error: the batch rolled by so many images,
#: so that sums run in another order, and in both formats. Runs may coincide bit for bit.
_ORDERS = (
    (1, torch.channels_last), (2, torch.contiguous_format), (3, torch.channels_last),
)  # fmt: skip


def check_block(
    stock: nn.Module,
    fused: nn.Module,
    x: Tensor,
    grad_out: Tensor | None = None,
    *,
    what: str = "block",
    steps: int = 1,
) -> dict[str, Tensor]:
    """Hold `fused` to `stock` by the 2x rule: output, gradients, buffers, their strides.

    The truth is `stock` in float64; torch's own error is the largest that `stock` makes as given
    and with the batch in other orders and formats. Neither module is changed: copies run.

    Args:
        stock: the module that defines the result.
        fused: the module under test, with the same parameter and buffer names and values.
        x: input, of the dtype and layout that both take; a gradient is taken if it requires one.
        grad_out: gradient of the output, of its shape; None takes a random one of seed 0. There
            is no backward where nothing requires a gradient.
        what: name for the messages.
        steps: forward passes (with backward) in a row; what is compared is the last one, and the
            buffers after all of them.

    Returns:
        The fused module's results by name: "out", "x", "grad ...", and buffers.

    Raises:
        AssertionError: naming the quantity and its worst channel.
    """
    if grad_out is None:
        grad_out = _random_like(stock, x)
    results = _run(fused, x, grad_out, steps)
    truth = _run(copy.deepcopy(stock).double(), _like(x, x.double()), grad_out.double(), steps)
    if results.keys() != truth.keys():
        raise AssertionError(f"{what} must give {sorted(truth)}, got {sorted(results)}")
    stocks = [_run(stock, x, grad_out, steps)]
    stocks += [_reordered(stock, x, grad_out, steps, *order) for order in _ORDERS]
    for name, value in results.items():
        _check_like(value, stocks[0][name], f"{what}: {name}")
        _compare(name, value, truth[name], [s[name] for s in stocks], what)
    return results


def _reordered(
    stock: nn.Module, x: Tensor, grad_out: Tensor, steps: int, shift: int, fmt: torch.memory_format
) -> dict[str, Tensor]:
    """Stock torch on the batch rolled by `shift`: the same result, summed in another order."""
    rolled = _like(x, x.roll(shift, 0).contiguous(memory_format=fmt))
    grad = grad_out.roll(shift, 0)
    if grad.dim() == 4:  # Torch's batch norm sums by the format of both.
        grad = grad.contiguous(memory_format=fmt)
    results = _run(stock, rolled, grad, steps)
    batch = ("out", "grad of x")
    return {k: v.roll(-shift, 0) if k in batch else v for k, v in results.items()}


def _compare(name: str, value: Tensor, truth: Tensor, stocks: Sequence[Tensor], what: str) -> None:
    if not value.is_floating_point():
        if not torch.equal(value, stocks[0]):
            raise AssertionError(f"{what}: {name} must be {stocks[0]}, got {value}")
        return
    # Several layers mix the channels, and a ReLU near zero may open in one run and not in the
    # other, so torch's error is taken from the whole tensor; a parameter's gradient is a sum in
    # which terms cancel, so that its own magnitude says nothing about its error.
    activation = name in ("out", "grad of x")
    many = activation and value.numel() >= _MANY * value.shape[1]
    more = [_either(value, truth)] if name.endswith("running_mean") else []
    assert_parity(
        value, truth, [*stocks, *more], what=f"{what}: {name}", channel_dim=int(activation),
        pool="channels" if many else "tensor", precision=stocks[0].dtype,
    )  # fmt: skip


def _either(value: Tensor, truth: Tensor) -> Tensor:
    """The mean of a channel with an infinity: NaN by Welford's method, infinite by a plain sum."""
    return torch.where(truth.isinf() & value.isnan(), value.to(truth.dtype), truth)


def _check_like(value: Tensor, stock: Tensor, what: str) -> None:
    """dtype and strides are part of parity; where C or H*W is 1, layouts are ambiguous."""
    if value.dtype != stock.dtype:
        raise AssertionError(f"{what} must be {stock.dtype}, got {value.dtype}")
    if value.shape != stock.shape:
        raise AssertionError(f"{what} must have shape {stock.shape}, got {value.shape}")
    clear = value.dim() == 4 and min(value.shape[1], value.shape[2] * value.shape[3]) > 1
    activation = what.endswith((": out", ": grad of x"))
    if activation and clear and value.stride() != stock.stride():
        raise AssertionError(f"{what} must have strides {stock.stride()}, got {value.stride()}")


def _like(x: Tensor, value: Tensor) -> Tensor:
    """`value` as an input that requires a gradient where x does."""
    return value.detach().requires_grad_(x.requires_grad)


def _random_like(stock: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = copy.deepcopy(stock)(x)
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(out.shape, generator=g).to(out.dtype).to(out.device)
    return torch.empty_like(out).copy_(grad)


def _run(module: nn.Module, x: Tensor, grad_out: Tensor, steps: int) -> dict[str, Tensor]:
    """Results of a copy of the module, after `steps` passes."""
    module = copy.deepcopy(module)
    for _ in range(steps):
        module.zero_grad(set_to_none=True)
        leaf = _like(x, x)
        out = module(leaf)
        if out.requires_grad:
            out.backward(grad_out)
    results = {"out": out.detach()}
    if leaf.grad is not None:
        results["grad of x"] = leaf.grad
    results |= {f"grad {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return results | {n: b.detach() for n, b in module.named_buffers()}
