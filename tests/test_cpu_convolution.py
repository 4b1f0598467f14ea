"""The chunked convolutions: several chunks, uneven ones, strides, and what is accumulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fastres
from fastres.kernels import Conv
from fastres.kernels.cpu import module
from fastres.testing import check_block

if module.why_not_built() is not None:
    pytest.skip("fastres._cpu was not built", allow_module_level=True)

from fastres.kernels.cpu import convolution


@pytest.fixture(params=[1, 2], ids=["one image a chunk", "two images a chunk"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Chunks of a few images; two threads, since one thread asks for large chunks."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(convolution, "_chunks", lambda images, *_: _ranges(images, request.param))
    yield request.param
    torch.set_num_threads(before)


def _ranges(images: int, step: int) -> list[tuple[int, int]]:
    return [(a, min(a + step, images)) for a in range(0, images, step)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("inplanes", "planes", "stride"), [(32, 8, 1), (32, 8, 2), (16, 8, 1)], ids=str
)
@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
def test_blocks_in_chunks(
    small_chunks: int, memory: str, inplanes: int, planes: int, stride: int, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN does not convolve bfloat16 on this CPU")
    downsample = None
    if stride != 1 or inplanes != 4 * planes:
        downsample = nn.Sequential(
            nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
        )
    stock = fastres.nn.stock.Bottleneck(inplanes, planes, stride, downsample).to(dtype)
    fused = fastres.Bottleneck(inplanes, planes, stride, downsample).to(dtype)
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(5, inplanes, 14, 14, dtype=dtype).to(memory_format=torch.channels_last)
    with fastres.use_backend("cpu"), fastres.use_memory(memory):
        check_block(stock, fused, x.requires_grad_())


def test_one_thread_gets_chunks_that_onednn_takes() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert list(convolution._chunks(32, 1 << 30)) == [(0, 16), (16, 32)]
        torch.set_num_threads(2)
        assert list(convolution._chunks(5, convolution.CHUNK_BYTES // 2)) == [
            (0, 2),
            (2, 4),
            (4, 5),
        ]
        assert list(convolution._chunks(3, 1)) == [(0, 3)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_turned_data_gradient_equals_torch_on_small_integers(
    kernel: int, stride: tuple[int, int]
) -> None:
    """Small integers are exact in float32, so no bit may differ."""
    conv = Conv(stride, (kernel // 2, kernel // 2), (1, 1), 1)
    weight = torch.randint(-3, 4, (4, 8, kernel, kernel)).float()
    x = torch.zeros(3, 8, 9, 7).to(memory_format=torch.channels_last)
    size = conv.output_size(x.shape[2:], weight.shape[2:])
    grad = torch.randint(-3, 4, (3, 4, *size)).float().to(memory_format=torch.channels_last)
    chunks = [(0, 2), (2, 3)]
    data = convolution._DataGradient(x, weight, conv, None, chunks)
    assert (data.transposed is not None) == (kernel == 1 or stride == (1, 1))
    for a, b in chunks:
        data.chunk(grad[a:b], a, b)
    expected = torch.nn.grad.conv2d_input(x.shape, weight, grad, stride, conv.padding)
    assert torch.equal(data.result, expected)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1)], ids=str)
def test_outputs_are_the_integers_of_torch(stride: tuple[int, int]) -> None:
    conv = Conv(stride)
    x = torch.randint(-3, 4, (2, 8, 5, 6)).float().contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-3, 4, (16, 8, 1, 1)).float()
    expected = torch.conv2d(x, weight, None, stride)
    y = convolution._convolved(x, weight, None, conv)
    assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    onto = torch.ones_like(y)
    convolution._convolve_into(onto, x, weight, None, conv)
    assert torch.equal(onto, expected + 1)


def test_backward_under_autocast_stays_in_float32() -> None:
    """What ran in float32 has gradients in it, wherever backward is called."""
    block = fastres.nn.ConvBNReLU(8, 16, 1)
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    grads = []
    for enabled in (False, True):
        out = block(x).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(out, block.conv.weight)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "bottleneck-pooled", "preact-basic"])
def test_contiguous_inference_below_float32_takes_one_pass_behind_a_convolution(
    kind: str, dtype: torch.dtype
) -> None:
    """Formulas took ten, and the block twice the time of torch's own modules."""
    from kinds import kind as named

    stock, block = named(kind).pair(last=False, training=False)
    x = named(kind).input(last=False, shape=(8, 20, 20)).detach()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        x = x.to(dtype)
        out, own = block(x), stock(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            block(x)
    assert out.dtype == dtype and out.is_contiguous()
    truth = stock.double()(x.double())
    error, rounding = (own - truth).abs().max(), torch.finfo(dtype).eps * truth.abs().max()
    assert (out - truth).abs().max() <= 2 * error + rounding
    ran = {event.key for event in profile.key_averages()}
    passes = {f"aten::{name}" for name in ("mul", "add", "where", "lt", "relu", "clamp_min")}
    assert not ran & passes, ran & passes
