"""The kernels with Mish on the cases for activations, and end to end against torch.

On a GPU, or in Triton's interpreter: TRITON_INTERPRET=1 pytest tests
"""

from __future__ import annotations

import os

import fastres_mish.mish  # noqa: F401  (registers it)
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres.functional import ConvNorm, bn_act, conv_bn_act, residual_block
from fastres.kernels import Branch, Gate, Implementation, Prologue, implementations
from fastres.kernels.triton import batch_norm, convolution
from fastres.kernels.triton.launch import recording
from fastres.kernels.triton.support import pretending
from fastres.kernels.types import Conv
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

needs_device = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
)

#: Those that meet an activation which is no gate.
MEETING = (
    "scale_shift_act", "bn_act_backward_reduce", "bn_act_backward_apply", "conv_forward",
    "conv_backward_weight", "conv_bn_act", "conv_backward",
)  # fmt: skip
KERNELS = [e for e in implementations(backend="triton") if e.primitive in MEETING]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_formulas_agree() -> None:
    check_activation("mish")


@needs_device
@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: f"{entry.primitive}-{entry.name}")
def test_kernels_compute_it(entry: Implementation) -> None:
    case = next(c for c in CASES if c.values == "normal" and c.conv and c.channels_last)
    with poisoned_allocations():
        ran = check_implementation(entry, case, device=DEVICE).ran
    assert [label for label in ran if "mish" in label]


class Stock(nn.Module):
    """Batch norm with Mish, behind a convolution or alone, out of torch's own modules."""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False) if conv else None
        self.norm = nn.BatchNorm2d(channels)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)
        nn.init.normal_(self.norm.bias, 0.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.norm(x if self.conv is None else self.conv(x)))


class Fused(Stock):
    """The same through fastres."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.training:
            norm.num_batches_tracked.add_(1)
        running = (norm.running_mean, norm.running_var)
        affine, more = (norm.weight, norm.bias), {"training": self.training, "act": "mish"}
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
    """Mish of a sum cannot be formed again from one branch, so the block is torch's own."""
    x, weight = torch.randn(2, 8, 5, 5, device=DEVICE), torch.randn(8, 8, 1, 1, device=DEVICE)
    out = residual_block(x, [ConvNorm(weight, training=True)], act="mish")
    torch.testing.assert_close(
        out, F.mish(F.batch_norm(F.conv2d(x, weight), None, None, training=True) + x)
    )


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels are not compiled")
@pytest.mark.parametrize("capability", DEVICES)
def test_nothing_spills(capability: int) -> None:
    """Compiled for GPUs that need not be there, with the launch shapes of ResNet-50's sizes."""
    meta = {"dtype": torch.bfloat16, "device": "meta", "memory_format": torch.channels_last}
    y, weight = torch.empty(256, 256, 56, 56, **meta), torch.empty(64, 256, 1, 1, **meta)
    branch = Branch(y, torch.empty(5, 256, device="meta"))
    gate = Gate("affine", None, "mish")
    with pretending(DEVICES[capability]), recording() as launches:
        batch_norm.scale_shift_act(y, branch.stats, act="mish")
        sums = batch_norm.bn_act_backward_reduce(y, gate, (branch,))
        batch_norm.bn_act_backward_apply(y, gate, (branch,), sums, 1 << 20, want_grads=(True,))
        prologue = Prologue(branch.stats, "mish")
        convolution.conv_forward(y, weight, None, Conv(), prologue=prologue)
    ours = [launch for launch in launches if launch.kernel.__name__ != "sum_partials_kernel"]
    assert len(ours) == 4
    for launch in ours:
        found = compiled(launch, capability)
        assert (found.stack, found.local) == (0, 0), launch.kernel
