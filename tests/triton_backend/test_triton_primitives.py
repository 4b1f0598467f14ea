"""Every Triton implementation on the whole table of cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backend_checks import accepts, check_cases, check_repeats
from torch import Tensor

from fastres.kernels import PRIMITIVES, Conv, Implementation, implementations
from fastres.kernels.triton import convolution, convolution_backward, products
from fastres.testing import CASES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_poison")]

ENTRIES = list(implementations(backend="triton"))
#: In portions, so that several processes share the work; layouts alternate in the table.
PORTIONS = [CASES[i::5] for i in range(5)]


@pytest.mark.grid(4)
@pytest.mark.parametrize("cases", PORTIONS, ids=lambda cases: f"from {cases[0]}")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e}-{e.primitive}")
def test_implementation_is_right_on_every_case(
    entry: Implementation, cases: tuple[Case, ...], device: str
) -> None:
    # A portion may be declined as a whole, not the table.
    ran = check_cases(entry, cases, device)
    assert ran or accepts(entry, CASES, device), "everything was declined"


@pytest.mark.parametrize(
    "primitive", ["conv_forward", "conv_bn_act", "conv_backward_data", "conv_backward_weight"]
)
def test_pixels_may_be_counted_in_64_bits(
    primitive: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from 2^30 of them on."""
    monkeypatch.setattr(products, "_FAR", 1)
    names = ("1x1wide", "unpadded", "1x1stride2", "groups of 16", "dilated")
    cases = [c for c in CASES if c.name in {f"{name}-f32-nhwc" for name in names}]
    assert len(cases) == len(names)
    for entry in implementations(primitive, "triton"):
        assert check_cases(entry, cases, device) > 0


def _untouched(size: int, device: str) -> Tensor:
    """Memory that nobody fills, so that the CPU gives none of it before it is written."""
    if device == "cuda":
        return torch.empty(size, dtype=torch.bfloat16, device=device)
    return torch.from_numpy(np.empty(size, np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("taps", [1, 3])
def test_an_image_may_have_more_than_2_to_the_31_elements(taps: int, device: str) -> None:
    """Three of its pixels are read, half of it apart, by a stride or by a dilation."""
    far, channels = 1 << 26, 16
    width = 2 * far + 1
    x = _untouched(width * channels, device).view(1, 1, width, channels).permute(0, 3, 1, 2)
    assert x.numel() > 1 << 31
    read = x[..., ::far].normal_().contiguous(memory_format=torch.channels_last)
    conv = Conv((1, far)) if taps == 1 else Conv(dilation=(1, far))
    dense = Conv()
    weight = torch.randn(16, channels, 1, taps, device=device).to(x.dtype)
    y, _ = convolution.conv_forward(x, weight, None, conv)
    expected, _ = convolution.conv_forward(read, weight, None, dense)
    assert torch.equal(y, expected)
    found = convolution_backward.conv_backward_weight(y, x, weight, conv)
    expected = convolution_backward.conv_backward_weight(y, read, weight, dense)
    assert torch.equal(found, expected)


#: What torch does behind the kernels.
POOLING = {"scale_shift_act_pool", "max_pool_backward"}


def test_every_primitive_but_pooling_has_one() -> None:
    found = {entry.primitive for entry in ENTRIES}
    assert found == {*PRIMITIVES} - {"bn_act_forward", "bn_act_backward", *POOLING}


@pytest.mark.parametrize("primitive", sorted({e.primitive for e in ENTRIES}))
def test_two_runs_give_the_same_bits(primitive: str, device: str) -> None:
    """250 repeats on a GPU, where a race would show; the interpreter has none to show."""
    own = (entry for entry in ENTRIES if entry.primitive == primitive)
    check_repeats(own, device, 250 if device == "cuda" else 2)
