"""The CPU's own convolutions: odd shapes, every instruction set, any number of threads, NaN, values
that Winograd's form is not for, and weights that change behind a packed copy.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastres
from bench.shapes import CONVOLUTIONS
from fastres.kernels import (
    Branch,
    Conv,
    Gate,
    Gated,
    PendingGrad,
    Prologue,
    implementations,
    reference,
)
from fastres.kernels.cpu import module
from fastres.kernels.registry import Request, select
from fastres.testing import VALUES, Case, check_implementation
from fastres.testing.compare import assert_parity

if module.why_not_built() is not None:
    pytest.skip("fastres._cpu was not built", allow_module_level=True)

from fastres.kernels.cpu import native

_cpu = module.module()


class Shape(NamedTuple):
    """[n, c, h, w] to k channels, by a kernel of one size."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: int
    stride: tuple[int, int] = (1, 1)
    padding: int = 0
    dilation: int = 1

    @property
    def squares(self) -> bool:
        """Whether Winograd's form can compute it."""
        return (self.kernel, self.stride, self.dilation) == (3, (1, 1), 1)

    @property
    def conv(self) -> Conv:
        return Conv(self.stride, (self.padding,) * 2, (self.dilation,) * 2, 1)

    def tensors(
        self, draw=torch.randn, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight and a gradient of the output."""
        x = channels_last(draw(self.n, self.c, self.h, self.w))
        weight = draw(self.k, self.c, self.kernel, self.kernel)
        size = self.conv.output_size((self.h, self.w), weight.shape[2:])
        grad = channels_last(draw(self.n, self.k, *size))
        return x.to(dtype), weight.to(dtype), grad.to(dtype)


#: Tails of rows, vectors and blocks; several panels and images in one; strides with and without
#: taps in each phase; padding beyond the image; pixels that no tap reads; a sum in several depths.
SHAPES = [
    Shape(1, 1, 1, 1, 1, 1),
    Shape(5, 64, 1, 1, 100, 1),
    Shape(3, 5, 5, 9, 7, 3, padding=1),
    Shape(2, 64, 9, 7, 130, 3, (2, 2), 1),
    Shape(2, 3, 17, 15, 64, 7, (2, 2), 3),
    Shape(1, 130, 7, 7, 70, 3, (1, 1), 2, 2),
    Shape(2, 40, 5, 6, 17, 1, (2, 2)),
    Shape(2, 17, 10, 6, 19, 1, (3, 1), 2),
    Shape(1, 8, 3, 3, 8, 3, (3, 3), 1),
    Shape(2, 20, 6, 6, 33, 2, (2, 3), 1),
    Shape(2, 70, 9, 9, 65, 3, (2, 2), 1, 2),
    Shape(2, 1100, 6, 5, 40, 1),
    Shape(2, 300, 5, 5, 20, 3, padding=1),
    Shape(2, 4, 4, 4, 6, 5, (1, 1), 4),
    Shape(8, 16, 16, 16, 24, 1),
    Shape(3, 16, 30, 31, 24, 3, padding=1),
]


#: For Winograd's form: odd edges, tails of channels and of columns, every kind of padding, several
#: panels, several images in one, and more channels than a panel has room for at all points.
SQUARES = [
    Shape(1, 33, 1, 2, 40, 3, padding=1),
    Shape(3, 33, 7, 9, 35, 3, padding=1),
    Shape(2, 64, 8, 5, 130, 3),
    Shape(1, 40, 5, 5, 32, 3, padding=2),
    Shape(2, 36, 4, 3, 40, 3, padding=4),
    Shape(2, 32, 41, 30, 64, 3, padding=1),
    Shape(3, 600, 6, 7, 70, 3, padding=1),
]
#: How a convolution is computed: float32 without and by Winograd's form, worth it or not; bfloat16.
DIRECT, WINOGRAD, BFLOAT16 = FORMS = ("float32", "winograd", "bfloat16")


def forms(shapes: list[Shape], squares: list[Shape]) -> list[tuple[Shape, str]]:
    """Shapes in each form that can compute them; `squares` by Winograd's alone."""
    by_squares = [(s, WINOGRAD) for s in (*shapes, *squares) if s.squares]
    return [(s, DIRECT) for s in shapes] + by_squares + [(s, BFLOAT16) for s in shapes]


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=_cpu.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def dtype_of(form: str) -> torch.dtype:
    return torch.bfloat16 if form == BFLOAT16 else torch.float32


def take(monkeypatch: pytest.MonkeyPatch, winograd: bool) -> None:
    """Winograd's form, or the other one, whatever the shape."""
    for rule in ("_is_winograd", "_is_winograd_gradient"):
        monkeypatch.setattr(native, rule, lambda *_, **__: winograd)


def on_threads(run) -> list[list[Tensor]]:
    """What `run` gives on one, two and three threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


def stats_of(channels: int) -> Tensor:
    """Statistics as if of some batch: [mean, var, invstd, scale, shift]."""
    return torch.stack(
        [torch.randn(channels), *torch.rand(2, channels) + 0.5, *torch.randn(2, channels)]
    )


def integers(*shape: int) -> Tensor:
    """Small integers: their sums are exact in float32, and round once to bfloat16."""
    return torch.randint(-3, 4, shape).float()


@pytest.mark.parametrize(("shape", "form"), forms(SHAPES, SQUARES), ids=str)
def test_small_integers_are_exact_whatever_the_threads(
    isa: str, shape: Shape, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(monkeypatch, form == WINOGRAD)
    dtype = dtype_of(form)
    x, weight, grad = shape.tensors(integers, dtype)
    conv, bias = shape.conv, integers(shape.k).to(dtype)
    start = channels_last(integers(*x.shape)).to(dtype)

    def run() -> list[Tensor]:
        y, state = native.conv_forward(x, weight, bias, conv, want_state=True)
        grad_x = native.conv_backward_data(grad, weight, x, conv)
        added = native.conv_backward_data(grad, weight, x, conv, accumulate=start)
        grad_weight = native.conv_backward_weight(grad, x, channels_last(weight), conv)
        assert state is not None
        return [y, state, grad_x, added, grad_weight]

    first, *others = on_threads(run)
    for other in others:
        assert all(map(torch.equal, first, other))
    y, state, grad_x, added, grad_weight = first
    stride, padding, dilation, _ = conv
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation)
    assert torch.equal(y, expected.to(dtype))
    expected = y.double()
    mean = expected.mean((0, 2, 3))
    torch.testing.assert_close(state[0], mean, rtol=0, atol=1e-4)
    m2 = (expected - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))
    torch.testing.assert_close(state[1], m2, rtol=1e-5, atol=1e-4)
    arguments = (stride, padding, dilation)
    wanted = torch.nn.grad.conv2d_input(x.shape, weight.double(), grad.double(), *arguments)
    assert torch.equal(grad_x, wanted.to(dtype))
    assert torch.equal(added, (wanted + start).to(dtype))
    wanted = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), *arguments)
    assert torch.equal(grad_weight, wanted.to(dtype))


@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize(
    ("shape", "form"),
    [pair for pair in forms(SHAPES[2:6], SQUARES[1:]) if pair != (SHAPES[2], WINOGRAD)],
    ids=str,
)
def test_whole_unit_equals_the_reference(
    isa: str, shape: Shape, form: str, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prologue, gradient formed on the way, gated residual, sums for the norm in front."""
    take(monkeypatch, form == WINOGRAD)
    dtype = dtype_of(form)
    x, weight, grad_out = shape.tensors(dtype=dtype)
    conv, before, behind = shape.conv, stats_of(shape.c), stats_of(shape.k)
    prologue = Prologue(before, act)
    y, _ = native.conv_forward(x, weight, None, conv, prologue=prologue)
    branch = Branch(y, behind)
    gate = Gate("affine", act=act) if act != "none" else Gate("none")
    sums = torch.randn(3, shape.k, dtype=torch.float64)
    added, out = [channels_last(torch.randn(x.shape)).to(dtype) for _ in range(2)]
    residual = Gated(added, Gate("out", out))
    count = y.numel() // shape.k
    front = Gate("affine", act=act) if act != "none" else Gate("none")
    first, *others = on_threads(
        lambda: list(
            native.conv_backward(
                PendingGrad(grad_out, gate, branch, sums, count), x, weight, conv,
                prologue=prologue, want_x=True, want_weight=True, accumulate=residual,
                reduce=(front, Branch(x, before)),
            )
        )
    )  # fmt: skip
    for other in others:
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])
        assert torch.equal(first[2][:2], other[2][:2])
    grad_x, grad_weight, own = first

    def wide(t: Tensor) -> Tensor:
        return t.double()

    def branch_of(y: Tensor, stats: Tensor) -> Branch:
        return Branch(wide(y), wide(stats))

    # bfloat16 rounds the result once, and some term to the other side than float64 does.
    near = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps

    acc = {"acc": torch.float64, "channels_last": True}
    (grad_y,), _ = reference.bn_act_backward_apply(
        wide(grad_out), gate, (branch_of(y, behind),), sums, count, want_grads=(True,), **acc
    )
    z, _ = reference.scale_shift_act(wide(x), wide(before), act=act, **acc)
    if form == BFLOAT16:  # as operands are stored
        grad_y, z = wide(grad_y.to(dtype)), wide(z.to(dtype))
    g = reference.act_backward(
        wide(residual.grad_out), residual.gate._replace(tensor=wide(residual.gate.tensor)), **acc
    )
    stride, padding, dilation, _ = conv
    expected = (
        torch.nn.grad.conv2d_input(x.shape, wide(weight), grad_y, stride, padding, dilation) + g
    )
    torch.testing.assert_close(
        wide(grad_x), expected, rtol=near, atol=near * float(expected.abs().max())
    )
    expected = torch.nn.grad.conv2d_weight(z, weight.shape, grad_y, stride, padding, dilation)
    torch.testing.assert_close(
        wide(grad_weight), expected, rtol=near, atol=near * float(expected.abs().max())
    )
    expected = reference.bn_act_backward_reduce(wide(grad_x), front, (branch_of(x, before),), **acc)
    scale = float(expected[:2].abs().max())
    torch.testing.assert_close(wide(own[:2]), expected[:2], rtol=1e-5, atol=1e-5 * scale)


def test_nan_reaches_no_weight_but_its_own(isa: str) -> None:
    """Pairs of pixels: lines of odd length, whose last pixel has no neighbour."""
    for shape in (SHAPES[2], SHAPES[3], SHAPES[5], SHAPES[10]):
        x, weight, grad = shape.tensors(dtype=torch.bfloat16)
        x[0, 0, :, -1] = x[-1, -1, -1] = float("nan")
        grad[0, 1, 0, -1] = float("inf")
        stride, padding, dilation, _ = shape.conv
        truth = torch.nn.grad.conv2d_weight(
            x.double(), weight.shape, grad.double(), stride, padding, dilation
        )
        found = native.conv_backward_weight(grad, x, weight, shape.conv)
        assert torch.equal(found.isfinite(), truth.isfinite()) and not truth.isfinite().all()


def test_subnormal_numbers_of_bfloat16(isa: str) -> None:
    """AVX512-BF16 takes them as zero, as oneDNN does by it; what is added behind keeps them."""
    x = channels_last(torch.full((1, 2, 4, 4), 2.0**-130, dtype=torch.bfloat16))
    weight, conv = torch.ones(3, 2, 1, 1, dtype=torch.bfloat16), Conv()
    y, _ = native.conv_forward(x, weight, None, conv)
    assert torch.equal(y, torch.full_like(y, 0 if isa == "avx512_bf16" else 2.0**-129))
    added = torch.full_like(y, 2.0**-131)
    stats = torch.zeros(5, 3)
    assert torch.equal(native.conv_bn_act(x, weight, None, conv, stats, residual=added), added)


def test_statistics_hold_far_from_zero(isa: str) -> None:
    """A mean of 1e4 with a standard deviation of 1, and an outlier where a shift is taken."""
    x = channels_last(torch.randn(4, 8, 20, 20, dtype=torch.float64) + 1e4).float()
    x[0, :, 0, 0] = -3e4
    weight = torch.eye(8).view(8, 8, 1, 1)
    _, state = native.conv_forward(x, weight, None, Conv(), want_state=True)
    wide = x.double()
    mean = wide.mean((0, 2, 3))
    m2 = (wide - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))
    torch.testing.assert_close(state[0], mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(state[1], m2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("act", ["none", "relu", "hardswish"])
def test_nan_reaches_what_it_reaches_in_torch(isa: str, act: str) -> None:
    x, weight, _ = SHAPES[3].tensors()
    x[1, 3, 4, 4] = float("nan")
    stats, residual = stats_of(130), None
    y = native.conv_bn_act(x, weight, None, SHAPES[3].conv, stats, residual=residual, act=act)
    expected = reference.conv_bn_act(
        x, weight, None, SHAPES[3].conv, stats, act=act, acc=torch.float64
    )
    assert torch.equal(y.isnan(), expected.isnan()) and y.isnan().any()


@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SQUARES[1:3], ids=str)
def test_squares_end_as_the_reference_does(
    isa: str, shape: Shape, residual: bool, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(monkeypatch, True)
    x, weight, like = shape.tensors()
    bias, stats, added = torch.randn(shape.k), stats_of(shape.k), like if residual else None
    y = native.conv_bn_act(x, weight, bias, shape.conv, stats, residual=added, act=act)
    wide = None if added is None else added.double()
    expected = reference.conv_bn_act(
        x.double(), weight.double(), bias.double(), shape.conv, stats.double(), residual=wide,
        act=act, acc=torch.float64,
    )  # fmt: skip
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("values", [v for v in VALUES if v != "integers"])
def test_squares_are_right_on_every_call(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, True)
    case = Case(
        "squares", (4, 36, 24, 9), values=values, conv=Conv(padding=(1, 1)), kernel=(3, 3),
        out_channels=40,
    )  # fmt: skip
    own = [entry for entry in implementations(backend="cpu") if entry.name == "native"]
    assert len(own) == 5
    for entry in own:
        assert check_implementation(entry, case).ran


#: Inputs and weights of [2, 64, 40, 30] by [64, 64, 3, 3] that are like none of a network's.
ODD_VALUES = {
    "large mean": lambda x, w: (x + 1e4, w),
    "wide range": lambda x, w: (x * torch.randint(-12, 13, x.shape).exp2(), w),
    "sparse": lambda x, w: (x * (torch.rand(x.shape) < 1 / 64), w),
    "nearly sparse": lambda x, w: (x * (torch.rand(x.shape) < 1 / 16), w),
    "identity": lambda x, w: (x, torch.nn.init.dirac_(w)),
    "nearly identity": lambda x, w: (x, 1e-9 * w + torch.nn.init.dirac_(torch.empty_like(w))),
    "pruned": lambda x, w: (x, w * (torch.rand(w.shape) < 1 / 16)),
    "tiny": lambda x, w: (x * 1e-18, w * 1e-18),
    "huge": lambda x, w: (x * 3e18, w * 3e18),
}


@pytest.mark.parametrize("values", ODD_VALUES)
def test_squares_are_as_close_as_torch(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 2x rule, by squares or without them, as the values want it."""
    take(monkeypatch, True)
    x, weight = ODD_VALUES[values](torch.randn(2, 64, 40, 30), torch.randn(64, 64, 3, 3) / 24)
    x, weight, conv = channels_last(x), channels_last(weight), Conv(padding=(1, 1))
    y, _ = native.conv_forward(x, weight, None, conv)
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    assert_parity(y, truth, [F.conv2d(x, weight, padding=1)], what=values)
    grad_x = native.conv_backward_data(x, weight, x, conv)
    arguments = (1, 1)
    truth = torch.nn.grad.conv2d_input(x.shape, weight.double(), x.double(), *arguments)
    torchs = torch.nn.grad.conv2d_input(x.shape, weight, x, *arguments)
    assert_parity(grad_x, truth, [torchs], what=f"{values}, data gradient")
    grad = channels_last(torch.randn(y.shape))
    grad_weight = native.conv_backward_weight(grad, x, weight, conv)
    truth = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), *arguments)
    torchs = torch.nn.grad.conv2d_weight(x, weight.shape, grad, *arguments)
    assert_parity(grad_weight, truth, [torchs], what=f"{values}, weight gradient", channel_dim=0)


@pytest.mark.parametrize("value", [1e4, 3e38, float("nan"), float("inf"), float("-inf")])
def test_what_one_value_reaches_is_computed_without_squares(
    isa: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its panel has the bits that it has without squares, and others those that they had."""
    x, weight, conv = torch.randn(2, 32, 60, 61), torch.randn(40, 32, 3, 3), Conv(padding=(1, 1))
    x = channels_last(x)

    def run() -> list[Tensor]:
        return [native.conv_forward(x, weight, None, conv)[0]]

    take(monkeypatch, True)
    (before,) = run()
    x[1, 3, 20, 60] = value
    first, *others = on_threads(run)
    take(monkeypatch, False)
    (direct,) = run()
    for other in others:
        assert torch.equal(first[0].nan_to_num(7), other[0].nan_to_num(7))
    reached, found = (1, slice(None), slice(19, 22), slice(59, 61)), first[0]
    assert torch.equal(found[reached].nan_to_num(7), direct[reached].nan_to_num(7))
    assert torch.equal(found.isfinite(), F.conv2d(x, weight, padding=1).isfinite())
    assert torch.equal(found[0], before[0]) and not torch.equal(found[0], direct[0])


@pytest.mark.parametrize("of_gradient", [False, True])
@pytest.mark.parametrize("value", [1e4, 3e38, float("nan"), float("inf")])
def test_one_value_reaches_its_own_part_of_the_weight_s_gradient(
    isa: str, value: float, of_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel's own: other channels' sums are those without it, to rounding."""
    x, weight, grad = SQUARES[5].tensors()
    (grad if of_gradient else x)[1, 20, 0, 0] = value

    def run() -> list[Tensor]:
        return [native.conv_backward_weight(grad, x, weight, SQUARES[5].conv)]

    take(monkeypatch, True)
    (first,), *others = on_threads(run)
    for (other,) in others:
        assert torch.equal(first.nan_to_num(7), other.nan_to_num(7))
    take(monkeypatch, False)
    (direct,) = run()
    assert torch.equal(first.isnan(), direct.isnan()) and torch.equal(first.isinf(), direct.isinf())
    truth = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    elsewhere = torch.ones_like(truth, dtype=torch.bool)
    elsewhere[(20,) if of_gradient else (slice(None), 20)] = False
    found = first[elsewhere]
    torch.testing.assert_close(found, truth[elsewhere].float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("value", [1e4, float("nan"), float("inf")])
def test_a_weight_that_squares_do_not_serve(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, conv = SQUARES[5].tensors()[0], torch.randn(40, 32, 3, 3), Conv(padding=(1, 1))
    weight[7, 3, 1, 2] = value
    found = []
    for winograd in (True, False):
        take(monkeypatch, winograd)
        found.append(native.conv_forward(x, weight, None, conv)[0].nan_to_num(7))
        found.append(native.conv_backward_data(found[0], weight, x, conv).nan_to_num(7))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize(
    ("shape", "kept", "once", "gradient"),
    [
        (Shape(8, 64, 56, 56, 64, 3, padding=1), True, True, True),
        (Shape(8, 256, 14, 14, 256, 3, padding=1), True, True, True),
        (Shape(1, 256, 14, 14, 256, 3, padding=1), True, True, False),
        (Shape(8, 512, 7, 7, 512, 3, padding=1), True, True, False),
        (Shape(2, 512, 7, 7, 512, 3, padding=1), True, False, False),
        (Shape(1, 512, 7, 7, 512, 3, padding=1), False, False, False),
        (Shape(64, 64, 3, 3, 64, 3, padding=1), False, False, False),
        (Shape(8, 16, 56, 56, 64, 3, padding=1), False, False, False),
        (Shape(8, 64, 56, 56, 64, 3, (2, 2), padding=1), False, False, False),
        (Shape(8, 64, 56, 56, 64, 3, padding=2, dilation=2), False, False, False),
        (Shape(8, 64, 56, 56, 64, 1), False, False, False),
    ],
    ids=str,
)
def test_squares_are_taken_where_they_pay(
    shape: Shape, kept: bool, once: bool, gradient: bool
) -> None:
    weight = torch.empty(shape.k, shape.c, shape.kernel, shape.kernel)
    job = native._Job.of(torch.empty(shape.n, shape.c, shape.h, shape.w), weight, shape.conv)
    assert native._is_winograd(job) is kept
    for transposed in (False, True):
        assert native._is_winograd(job, transposed, once=True) is once
    assert native._is_winograd_gradient(job) is gradient


def test_squares_are_refused_for_other_kernels() -> None:
    job = native._Job.of(torch.empty(1, 8, 4, 4), torch.empty(8, 8, 1, 1), Conv())
    with pytest.raises(ValueError, match="three by three taps in steps of one"):
        _cpu.winograd_size(job.shape, False)


def test_where_onednn_has_amx_it_convolves_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_has_amx", lambda: True)
    for dtype, name in ((torch.float32, "native"), (torch.bfloat16, "onednn_chunked")):
        request = Request("cpu", dtype, True, conv=Conv(), weight=(8, 8, 1, 1))
        found, _ = select("conv_forward", ("cpu",), request)
        assert found is not None and found.name == name


def test_nothing_to_convolve() -> None:
    size = (0, 4, 3, 3)
    x, weight = channels_last(torch.randn(size)), torch.randn(5, 4, 1, 1)
    y, state = native.conv_forward(x, weight, None, Conv(), want_state=True)
    assert y.shape == (size[0], 5, *size[2:]) and torch.equal(state, torch.zeros_like(state))
    assert native.conv_backward_weight(y, x, weight, Conv()).count_nonzero() == 0


# ---------------------------------------------------------------- packed weights


def infer(x: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        stats = torch.ones(5, weight.shape[0])
        return native.conv_bn_act(x, weight, None, Conv(), stats)


def by_torch(x: Tensor, weight: Tensor) -> Tensor:
    return (F.conv2d(x.double(), weight.detach().double()) + 1).to(x.dtype)


#: Weights by the form in which they are kept.
WEIGHTS = {DIRECT: (9, 8, 1, 1), WINOGRAD: (33, 32, 3, 3), BFLOAT16: (9, 8, 1, 1)}
#: How near float64 a result is: to one rounding in bfloat16.
NEAR = {torch.float32: {"rtol": 1e-5, "atol": 1e-4}, torch.bfloat16: {"rtol": 4e-3, "atol": 4e-3}}


def to_be_kept(form: str) -> tuple[Tensor, torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.randn(WEIGHTS[form]).to(dtype_of(form)))
    return channels_last(torch.randn(2, weight.shape[1], 8, 8)).to(weight.dtype), weight


def negate(weight: Tensor) -> None:
    with torch.no_grad():
        weight.neg_()


def negate_behind_the_counter(weight: Tensor) -> None:
    weight.data.neg_()


def negate_one_channel(weight: Tensor) -> None:
    weight.data[3].neg_()


def exchange_memory(weight: Tensor) -> None:
    weight.data = -weight.data


def change_layout(weight: Tensor) -> None:
    weight.data = weight.data.flip(0).contiguous().transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(
    "change",
    [negate, negate_behind_the_counter, negate_one_channel, exchange_memory, change_layout],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("form", WEIGHTS)
def test_a_changed_weight_is_packed_anew(form: str, change) -> None:
    x, weight = to_be_kept(form)
    key, near = (id(weight), form == WINOGRAD), NEAR[x.dtype]
    torch.testing.assert_close(infer(x, weight), by_torch(x, weight), **near)
    packed = native._kept[key].packed
    infer(x, weight)
    assert native._kept[key].packed is packed  # kept while nothing changes
    change(weight)
    torch.testing.assert_close(infer(x, weight), by_torch(x, weight), **near)


@pytest.mark.parametrize("form", WEIGHTS)
def test_a_packed_weight_goes_with_its_parameter(form: str) -> None:
    x, weight = to_be_kept(form)
    infer(x, weight)
    key = id(weight), form == WINOGRAD
    assert key in native._kept
    del weight
    gc.collect()
    assert key not in native._kept


def test_weights_of_inference_mode_have_no_counter_and_are_not_kept() -> None:
    with torch.inference_mode():
        x, weight = channels_last(torch.randn(2, 8, 5, 5)), torch.randn(9, 8, 1, 1)
        torch.testing.assert_close(infer(x, weight), by_torch(x, weight))
        assert (id(weight), False) not in native._kept


def test_a_weight_that_autocast_casts_is_not_kept() -> None:
    """It is another one at each call."""
    block = fastres.nn.BasicBlock(8, 8).eval().to(memory_format=torch.channels_last)
    x, kept, found = channels_last(torch.randn(2, 8, 5, 5)), len(native._kept), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            found.append(block(x))
            block.conv1.weight.neg_()
    assert found[0].dtype == torch.bfloat16 and len(native._kept) == kept
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


#: Of ResNet-50's convolutions with so many images and threads: the least part of the threads' time
#: that may be put to use. Panels are cut by the shape alone, for any number of threads.
BUSY = [
    (1, {1: 1.0, 2: 0.75, 4: 0.75, 8: 0.55, 16: 0.4, 64: 0.1}),
    (8, {1: 1.0, 2: 0.9, 4: 0.85, 8: 0.85, 16: 0.7, 64: 0.25}),
    (32, {1: 1.0, 2: 0.95, 4: 0.95, 8: 0.95, 16: 0.7, 64: 0.25}),
]


@pytest.mark.parametrize(("images", "least"), BUSY)
@pytest.mark.parametrize("kind", ["forward", "data", "weight"])
def test_threads_have_equal_shares(kind: str, images: int, least: dict[int, float]) -> None:
    for shape in CONVOLUTIONS.values():
        if kind == "data" and shape.channels == 3:
            continue
        x = torch.empty(images, shape.channels, shape.size, shape.size)
        weight = torch.empty(shape.outputs, shape.channels, shape.kernel, shape.kernel)
        conv = Conv((shape.stride,) * 2, (shape.kernel // 2,) * 2)
        job = native._Job.of(x, weight, conv)
        if kind == "weight":
            squares = native._is_winograd_gradient(job)
        else:
            squares = native._is_winograd(job, kind == "data", once=True)
        whole = None
        for team, busy in least.items():
            shares = _cpu.shares(job.shape, kind, squares, team)
            whole = sum(shares) if whole is None else whole
            assert sum(shares) == whole, "some of the work is nobody's, or done twice"
            assert sum(shares) >= busy * team * max(shares), (shape.name, team, shares)
