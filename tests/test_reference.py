"""The truth is held to calculus: fp64 gradcheck, torch's autograd, and torch's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.kernels import Branch, Conv, Gate, Prologue, reference

F64 = torch.float64


class _NormAct(torch.autograd.Function):
    """act(batch_norm(y) + residual) by the reference's forward and backward formulas."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, act: str, batch: bool
    ) -> Tensor:
        count = y.numel() // y.shape[1]
        running = (torch.full_like(weight, 0.1), torch.full_like(weight, 0.7))
        state = reference.channel_stats(y) if batch else None
        stats = reference.finalize_stats(state, count, running, weight, bias, 1e-3)
        out, mask = reference.scale_shift_act(
            y, stats, residual=residual, act=act, want_mask=True, channels_last=False
        )
        gate = Gate("mask", mask) if act == "relu" else Gate("none")
        ctx.rest = (Branch(y, stats), gate, count if batch else 0)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, count = ctx.rest
        args = (grad_out.contiguous(), gate, (branch,))
        sums = reference.bn_act_backward_reduce(*args, channels_last=False)
        (grad_y,), grad_residual = reference.bn_act_backward_apply(
            *args, sums, count, want_grads=(True,), want_residual=True, channels_last=False
        )
        return grad_y, grad_residual, sums[1], sums[0], None, None


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("act", ["none", "relu"])
def test_backward_formulas_pass_gradcheck(act: str, batch: bool) -> None:
    shape = (3, 2, 2, 3)
    inputs = [torch.randn(s, dtype=F64, requires_grad=True) for s in (shape, shape, 2, 2)]
    assert torch.autograd.gradcheck(lambda *t: _NormAct.apply(*t, act, batch), inputs)


@pytest.mark.parametrize(
    "conv",
    [
        Conv(padding=(1, 1)),
        Conv((2, 2), (1, 1)),
        Conv((1, 1), (2, 2), (2, 2)),
        Conv((1, 2), (1, 1), (1, 1), 2),
    ],
    ids=["plain", "stride2", "dilated", "groups"],
)
def test_convolution_gradients_are_autograds(conv: Conv) -> None:
    x = torch.randn(2, 4, 6, 5, dtype=F64, requires_grad=True)
    w = torch.randn(6, 4 // conv.groups, 3, 3, dtype=F64, requires_grad=True)
    y, _ = reference.conv_forward(x, w, None, conv)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, w), g)
    other = torch.randn_like(x)
    data = reference.conv_backward_data(g, w, x, conv, accumulate=other)
    # Same formula in the same dtype, in another order at most: 2^6 terms of float64 rounding.
    torch.testing.assert_close(data, expected[0] + other, rtol=1e-13, atol=1e-13)
    weight = reference.conv_backward_weight(g, x, w, conv)
    torch.testing.assert_close(weight, expected[1], rtol=1e-13, atol=1e-13)


def test_prologue_comes_before_zero_padding() -> None:
    x, w = torch.randn(2, 3, 4, 4, dtype=F64), torch.randn(5, 3, 3, 3, dtype=F64)
    stats = torch.randn(5, 3, dtype=F64)
    y, _ = reference.conv_forward(
        x, w, None, Conv(padding=(1, 1)), prologue=Prologue(stats, "relu")
    )
    z = F.relu(x * stats[3].view(1, -1, 1, 1) + stats[4].view(1, -1, 1, 1))
    torch.testing.assert_close(y, F.conv2d(z, w, padding=1), rtol=1e-13, atol=1e-13)


def test_statistics_merge_to_those_of_the_whole() -> None:
    y = torch.randn(6, 5, 3, 3, dtype=F64) * 3 + 100
    state = None
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        state = reference.channel_stats(y[start:stop], state, start * 9)
    assert state is not None
    # Both sides round 54 terms of size 100^2 in float64 at most.
    torch.testing.assert_close(state, reference.channel_stats(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 7, 3, 3), (1, 8, 2, 4), (3, 17, 5, 1)])
def test_masks_survive_packing(shape: tuple[int, ...], channels_last: bool) -> None:
    bits = torch.rand(shape) < 0.5
    mask = reference.pack_mask(bits, channels_last)
    assert torch.equal(reference.unpack_mask(mask, shape, channels_last), bits)
    rows = shape[0] * (shape[2] * shape[3] if channels_last else shape[1])
    inner = shape[1] if channels_last else shape[2] * shape[3]
    assert mask.shape == (rows, (inner + 7) // 8)
    # Padding bits are zero, so that equal masks are equal bytes.
    assert inner % 8 == 0 or bool((mask[:, -1] >> (inner % 8) == 0).all())


def test_relu_lets_nan_through_and_keeps_negative_zero() -> None:
    v = torch.tensor([float("nan"), -0.0, 0.0, -1.0, float("inf"), float("-inf")])
    found, expected = reference.activate(v, "relu"), F.relu(v)
    assert torch.equal(torch.signbit(found), torch.signbit(expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    v = v.view(1, -1, 1, 1).requires_grad_()
    F.relu(v).sum().backward()
    gate = Gate("out", F.relu(v.detach()))
    ones = torch.ones_like(v)
    assert torch.equal(reference.act_backward(ones, gate, channels_last=False), v.grad)


@pytest.mark.parametrize("training", [True, False])
def test_reference_is_batch_norm(training: bool) -> None:
    y, weight, bias = (
        torch.randn(4, 3, 5, 5, dtype=F64),
        torch.rand(3).double(),
        torch.rand(3).double(),
    )
    mean, var = torch.rand(3).double(), torch.rand(3).double() + 0.5
    state = reference.channel_stats(y) if training else None
    stats = reference.finalize_stats(state, 100, (mean, var), weight, bias, 1e-5)
    out, _ = reference.scale_shift_act(y, stats, channels_last=False)
    expected = F.batch_norm(y, mean, var, weight, bias, training)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


def test_finalize_needs_some_statistics() -> None:
    with pytest.raises(ValueError, match="one of state and running must be given"):
        reference.finalize_stats(None, 1, None, None, None, 1e-5)
