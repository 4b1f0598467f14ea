"""The kernels on every case, and batch norm with SiLU end to end against torch.

On a GPU, or in Triton's interpreter: TRITON_INTERPRET=1 pytest tests
"""

from __future__ import annotations

import os

import pytest
import torch
from fastres_silu import silu
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres.functional import ConvNorm, bn_act, conv_bn_act, residual_block
from fastres.kernels import Branch, Gate, Implementation, implementations
from fastres.kernels.triton.launch import recording
from fastres.kernels.triton.support import pretending
from fastres.testing import (
    CASES,
    Case,
    check_activation,
    check_block,
    check_implementation,
    poisoned_allocations,
)
from fastres.testing.ahead import DEVICES, compiled

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# The interpreter's numpy says so where exp(-v) is infinite and silu(v) rightly zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
needs_device = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


OURS = [entry for entry in implementations(backend="triton") if entry.name == "silu"]


def test_it_was_found() -> None:
    assert [entry.primitive for entry in OURS] == [
        "scale_shift_act", "bn_act_backward_reduce", "bn_act_backward_apply",
    ]  # fmt: skip


def test_the_formulas_agree() -> None:
    check_activation("silu")


@needs_device
@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.primitive)
def test_kernel_is_right_on_every_case(entry: Implementation) -> None:
    with poisoned_allocations():
        ran = sum(len(check_implementation(entry, case, device=DEVICE).ran) for case in CASES)
    assert ran > 50


@needs_device
@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.primitive)
def test_what_it_declines_it_explains(entry: Implementation) -> None:
    declined = check_implementation(entry, CASES[0], device=DEVICE).declined
    assert "its activation is silu, got relu" in declined.values()
    double = next(case for case in CASES if case.dtype == torch.float64)
    outcome = check_implementation(entry, double, device=DEVICE)
    assert not outcome.ran
    assert any("dtype must be float32, bfloat16 or float16" in r for r in outcome.declined.values())


# ---------------------------------------------------------------- end to end


class Stock(nn.Module):
    """Batch norm with SiLU, behind a convolution or alone, out of torch's own modules."""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False) if conv else None
        self.norm = nn.BatchNorm2d(channels)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)
        nn.init.normal_(self.norm.bias, 0.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x if self.conv is None else self.conv(x)))


class Fused(Stock):
    """The same through fastres."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.training:
            norm.num_batches_tracked.add_(1)
        running = (norm.running_mean, norm.running_var)
        affine, more = (norm.weight, norm.bias), {"training": self.training, "act": "silu"}
        with fastres.use_backend("triton"):
            if self.conv is None:
                return bn_act(x, *running, *affine, **more)
            return conv_bn_act(x, self.conv.weight, *running, *affine, padding=1, **more)


@needs_device
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("conv", [False, True], ids=["norm", "conv"])
def test_unit_is_torchs(
    conv: bool, dtype: torch.dtype, channels_last: bool, training: bool
) -> None:
    case = Case("unit", (4, 20, 7, 6), dtype, channels_last)
    stock = Stock(20, conv).to(DEVICE, dtype).train(training)
    unit = Fused(20, conv).to(DEVICE, dtype).train(training)
    unit.load_state_dict(stock.state_dict())
    check_block(stock, unit, case.activation("x", device=DEVICE).requires_grad_())


@needs_device
def test_behind_a_shortcut_torch_runs() -> None:
    """SiLU of a sum cannot be formed again from one branch, so the block is torch's own."""
    x, weight = torch.randn(2, 8, 5, 5, device=DEVICE), torch.randn(8, 8, 1, 1, device=DEVICE)
    out = residual_block(x, [ConvNorm(weight, training=True)], act="silu")
    torch.testing.assert_close(
        out, F.silu(F.batch_norm(F.conv2d(x, weight), None, None, training=True) + x)
    )


# ---------------------------------------------------------------- ahead of time


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels are not compiled")
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("capability", DEVICES)
def test_nothing_spills(capability: int, channels_last: bool) -> None:
    """Compiled for GPUs that need not be there, with the launch shapes of ResNet-50's sizes."""
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    y = torch.empty(256, 256, 56, 56, **meta).contiguous(memory_format=fmt)
    branch = Branch(y, torch.empty(5, 256, device="meta"))
    gate = Gate("affine", None, "silu")
    with pretending(DEVICES[capability]), recording() as launches:
        silu.scale_shift_silu(y, branch.stats)
        sums = silu.bn_silu_backward_reduce(y, gate, (branch,))
        for count in (256 * 56 * 56, 0):
            silu.bn_silu_backward_apply(y, gate, (branch,), sums, count, want_grads=(True,))
    ours = [launch for launch in launches if launch.kernel.__module__ == silu.__name__]
    assert len(ours) == 4
    for launch in ours:
        found = compiled(launch, capability)
        assert (found.stack, found.local) == (0, 0), launch.kernel
