"""The functional API against torch's own modules: numbers, layouts, semantics, errors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastres import functional
from fastres.block import use_backend, use_memory
from fastres.functional import ConvNorm
from fastres.kernels import BACKENDS
from fastres.testing import (
    BLOCK_CASES,
    BlockCase,
    FunctionalBlock,
    assert_parity,
    check_block,
)

pytestmark = pytest.mark.usefixtures("_poison")

BACKENDS_HERE = [n for n, b in BACKENDS.items() if "cpu" in b.devices and b.why_not() is None]
MODES = ("speed", "balanced", "lean")


# ---------------------------------------------------------------- numbers


@pytest.mark.grid(2)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
def test_block_is_the_stock_block(case: BlockCase, backend: str) -> None:
    stock = case.stock()
    x = case.input().requires_grad_()
    for mode in MODES if case.dtype == torch.float32 else ("balanced",):
        with use_backend(backend), use_memory(mode):
            check_block(stock, FunctionalBlock.of(stock), x, what=f"{backend}, {mode}, {case}")


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_block_in_inference_is_the_stock_block(backend: str) -> None:
    for case in BLOCK_CASES:
        stock = replace(case, training=False).stock()
        with use_backend(backend), torch.no_grad():
            check_block(stock, FunctionalBlock.of(stock), case.input(), what=f"{backend}, {case}")


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_three_steps_keep_the_running_statistics_together(backend: str) -> None:
    case = BlockCase("steps", shortcut="projection", stride=2)
    stock = case.stock()
    with use_backend(backend):
        found = check_block(
            stock, FunctionalBlock.of(stock), case.input().requires_grad_(), steps=3
        )
    assert int(found["norms.0.num_batches_tracked"]) == 3


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_training_follows_the_stock_model(backend: str) -> None:
    """Ten SGD steps; the loss curves stay within float32 noise amplified by the steps."""
    case = BlockCase("training", shortcut="projection", shape=(8, 8, 6, 6))
    stock = case.stock()
    models = [FunctionalBlock.of(stock), stock.double()]
    x, target = case.input(), torch.randn(8, 32, 6, 6)
    losses = []
    with use_backend(backend):
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            dtype = next(model.parameters()).dtype
            for _ in range(10):
                optimizer.zero_grad()
                loss = (model(x.to(dtype)) - target.to(dtype)).square().mean()
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
    # A step amplifies a perturbation by 1 + lr * curvature < 4 here: 4^10 * 2^-24 = 0.06, and
    # errors of random sign stay two orders below that bound.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---------------------------------------------------------------- single functions


def _norm(c: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var = torch.rand(c), torch.rand(c) + 0.5
    return mean, var, torch.rand(c).requires_grad_(), torch.rand(c).requires_grad_()


def _results(
    out: Tensor, inputs: list[Tensor], running: list[Tensor], grad: Tensor
) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)), *running]


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_bn_relu_and_bn_add_relu(residual: bool, training: bool, backend: str) -> None:
    x, r = torch.randn(4, 6, 5, 4), torch.randn(4, 6, 5, 4)
    parameters, grad = _norm(), torch.randn(4, 6, 5, 4)

    def run(dtype: torch.dtype, fused: bool) -> list[Tensor]:
        given, other = (t.to(dtype).requires_grad_() for t in (x, r))
        mean, var, w, b = (t.detach().to(dtype).clone() for t in parameters)
        w.requires_grad_()
        b.requires_grad_()
        if fused and residual:
            out = functional.bn_add_relu(given, other, mean, var, w, b, training)
        elif fused:
            out = functional.bn_relu(given, mean, var, w, b, training)
        else:
            z = F.batch_norm(given, mean, var, w, b, training)
            out = F.relu(z + other if residual else z)
        inputs = [given, other, w, b] if residual else [given, w, b]
        return _results(out, inputs, [mean, var], grad)

    with use_backend(backend):
        found = run(torch.float32, True)
    rows = zip(found, run(torch.float64, False), run(torch.float32, False), strict=True)
    for i, (value, truth, stock) in enumerate(rows):
        assert_parity(value, truth, [stock], what=f"result {i}", pool="tensor")


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_add_relu_has_torchs_bits(backend: str) -> None:
    x, r = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    x[0, 1, 0, 0], x[0, 2], r[0, 2] = float("nan"), -0.0, -0.0
    grad = torch.randn_like(x)
    pairs = []
    for function in (functional.add_relu, lambda a, b: F.relu(a + b)):
        a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
        with use_backend(backend):
            out = function(a, b)
            pairs.append((out, *torch.autograd.grad(out, (a, b), grad)))
    for found, expected in zip(*pairs, strict=True):
        assert torch.equal(torch.signbit(found), torch.signbit(expected))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_conv_bn_act(backend: str, training: bool, act: str) -> None:
    x, w = torch.randn(4, 8, 6, 6), torch.randn(6, 4, 3, 3) / 6
    parameters, grad = _norm(), torch.randn(4, 6, 3, 3)
    bias = torch.rand(6)

    def run(dtype: torch.dtype, fused: bool) -> list[Tensor]:
        given, weight, cb = (t.to(dtype).requires_grad_() for t in (x, w, bias))
        mean, var, nw, nb = (t.detach().to(dtype).clone().requires_grad_(i > 1)
                             for i, t in enumerate(parameters))  # fmt: skip
        if fused:
            out = functional.conv_bn_act(
                given, weight, mean, var, nw, nb, cb, 2, 1, 1, 2, training, act=act
            )
        else:
            y = F.conv2d(given, weight, cb, 2, 1, 1, 2)
            out = F.batch_norm(y, mean, var, nw, nb, training)
            out = F.relu(out) if act == "relu" else out
        return _results(out, [given, weight, cb, nw, nb], [mean, var], grad)

    with use_backend(backend):
        found = run(torch.float32, True)
    rows = zip(found, run(torch.float64, False), run(torch.float32, False), strict=True)
    for i, (value, truth, stock) in enumerate(rows):
        assert_parity(value, truth, [stock], what=f"result {i}", pool="tensor")


def test_batch_norm_alone_inside_a_block_is_right_or_an_error() -> None:
    """A layer without a convolution in the middle: never silently wrong."""
    w = torch.randn(4, 4, 1, 1)
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    layers = [ConvNorm(w, training=True), ConvNorm(None, training=True)]
    try:
        out = functional.residual_block(x, layers)
    except (ValueError, NotImplementedError):
        return
    z = F.relu(F.batch_norm(F.conv2d(x, w), None, None, training=True))
    expected = F.relu(F.batch_norm(z, None, None, training=True) + x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- who wants a gradient

_NAMES = ("x", "conv", "conv bias", "norm weight", "norm bias", "projection")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_every_subset_of_gradients(backend: str, training: bool) -> None:
    case = BlockCase("subsets", "basic", (3, 4, 4, 4), 4, "projection", conv_bias=True)
    stock = replace(case, training=training, dtype=torch.float64).stock()
    fused = FunctionalBlock.of(stock)
    x = replace(case, dtype=torch.float64).input()
    for wanted in itertools.product([False, True], repeat=len(_NAMES)):
        flags = dict(zip(_NAMES, wanted, strict=True))
        results = []
        for module in (stock, fused):
            _require(module, flags)
            module.zero_grad()
            given = x.clone().requires_grad_(flags["x"])
            with use_backend(backend):
                out = module(given)
                assert out.requires_grad == any(wanted)
                if any(wanted):
                    out.square().sum().backward()
            results.append([given.grad, *(p.grad for p in module.parameters())])
        for expected, found in zip(*results, strict=True):
            assert (expected is None) == (found is None), flags
            if expected is not None:
                # Both are float64: 2^11 terms of rounding 2^-53, and gradients of size 10.
                torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def _require(module: nn.Module, flags: dict[str, bool]) -> None:
    """Switch the first unit's parameters one by one, the projection's together, others off."""
    for name, p in module.named_parameters():
        kind, index, which = name.split(".")
        if index == "2":
            p.requires_grad_(flags["projection"])
        elif index == "0":
            key = {"convs": "conv", "norms": "norm"}[kind]
            key += {"weight": " weight", "bias": " bias"}[which]
            p.requires_grad_(flags[key.replace("conv weight", "conv")])
        else:
            p.requires_grad_(False)


# ---------------------------------------------------------------- layouts


def _bottleneck(channels_last: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
    case = BlockCase("layouts", channels_last=channels_last, shape=(4, 16, 6, 5))
    stock = case.stock()
    return stock, FunctionalBlock.of(stock), case.input()


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("weights_last", [True, False])
@pytest.mark.parametrize("view", ["nhwc", "nchw", "sliced", "expanded", "transposed", "stepped"])
def test_inputs_of_any_stride(view: str, weights_last: bool, backend: str) -> None:
    stock, fused, x = _bottleneck(weights_last)
    views = {
        "nhwc": lambda t: t.contiguous(memory_format=torch.channels_last),
        "nchw": lambda t: t.contiguous(),
        "sliced": lambda t: F.pad(t, (1, 2))[..., 1:-2],
        "expanded": lambda t: t[:1].expand_as(t),
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "stepped": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    }
    strided = views[view](x)
    results = []
    for module in (stock, fused):
        leaf = strided.detach().clone().requires_grad_()
        with use_backend(backend):
            out = module(leaf.as_strided(strided.shape, leaf.stride()))
            out.sum().backward()
        results.append((out.detach(), leaf.grad))
    for expected, found in zip(*results, strict=True):
        # Two float32 chains, each within 2^10 roundings of values of size 10.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    if view in ("nhwc", "nchw"):
        assert results[1][0].stride() == results[0][0].stride()
        assert results[1][1].stride() == results[0][1].stride()


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("kind", ["other layout", "expanded", "sliced"])
def test_gradients_of_any_stride(kind: str, backend: str) -> None:
    stock, fused, x = _bottleneck()
    grad = {
        "other layout": torch.randn(4, 16, 6, 5),
        "expanded": torch.randn(1, 16, 1, 1).expand(4, 16, 6, 5),
        "sliced": torch.randn(4, 16, 6, 9)[..., 2:7],
    }[kind]
    kept = grad.clone()
    with use_backend(backend):
        check_block(stock, fused, x.requires_grad_(), grad)
    assert torch.equal(grad, kept), "grad_out must not be written to"


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_sum_backward_is_an_expanded_gradient(backend: str) -> None:
    _, fused, x = _bottleneck()
    with use_backend(backend):
        x.requires_grad_()
        fused(x).sum().backward()
        (one,) = torch.autograd.grad(fused(x), x, torch.ones(4, 16, 6, 5))
    torch.testing.assert_close(x.grad, one, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_one_layout_or_the_other_gives_the_same(backend: str) -> None:
    results = []
    for last in (True, False):
        case = BlockCase("same", channels_last=last, dtype=torch.float64)
        module, x = FunctionalBlock.of(case.stock()), case.input().requires_grad_()
        with use_backend(backend):
            out = module(x)
        grad = torch.linspace(-1, 1, out.numel()).double().view(out.shape)
        results.append([out, *torch.autograd.grad(out, [x, *module.parameters()], grad)])
    for a, b in zip(*results, strict=True):
        # float64 on both sides: 2^11 terms of rounding 2^-53.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_batch_order_does_not_matter(backend: str) -> None:
    case = BlockCase("permuted", dtype=torch.float64)
    x, order = case.input(), torch.tensor([2, 0, 3, 1])
    results = []
    with use_backend(backend):
        for index in (torch.arange(4), order):
            module, given = FunctionalBlock.of(case.stock()), x[index].requires_grad_()
            out = module(given)
            out.square().sum().backward()
            grads = [p.grad for p in module.parameters()]
            back = index.argsort()
            results.append([out[back], given.grad[back], *grads, *module.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_training_gradient_sums_to_zero_over_a_channel(backend: str) -> None:
    x = torch.randn(4, 5, 6, 7, dtype=F64, requires_grad=True)
    with use_backend(backend):
        out = functional.bn_relu(x, None, None, training=True)
    (grad,) = torch.autograd.grad(out, x, torch.randn_like(out))
    # 168 terms of size 4 in float64.
    assert grad.sum((0, 2, 3)).abs().max() < 168 * 4 * 2**-52
    assert (grad * x).sum((0, 2, 3)).abs().max() < 1e-2  # Zero but for eps.


F64 = torch.float64


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    n=st.integers(1, 4), c=st.integers(1, 9), h=st.integers(1, 6), w=st.integers(1, 6),
    width=st.integers(2, 5), stride=st.integers(1, 3), dilation=st.integers(1, 2),
    last=st.booleans(), kind=st.sampled_from(["basic", "bottleneck"]),
)  # fmt: skip
def test_any_shape(
    backend: str, n: int, c: int, h: int, w: int, width: int, stride: int, dilation: int,
    last: bool, kind: str,
) -> None:  # fmt: skip
    case = BlockCase(
        f"any-{n}{c}{h}{w}{width}{stride}", kind, (n, c, h, w), width, "projection", stride,
        dilation, channels_last=last, dtype=torch.float64,
    )  # fmt: skip
    if n * (-(-h // stride)) * (-(-w // stride)) == 1:
        return
    stock = case.stock()
    with use_backend(backend):
        check_block(stock, FunctionalBlock.of(stock), case.input().requires_grad_(), what=str(case))


# ---------------------------------------------------------------- semantics and errors


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_torchs(dtype: torch.dtype, backend: str) -> None:
    case = BlockCase("autocast", shape=(8, 32, 20, 20))
    stock = case.stock()

    class Under(nn.Module):
        def __init__(self, block: nn.Module, enabled: bool = True) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            lower = x.dtype != torch.float64
            with torch.autocast("cpu", dtype, enabled=lower):
                return self.block(x.to(dtype) if lower else x)

    x = case.input().to(dtype).float().requires_grad_()
    with use_backend(backend):
        found = check_block(Under(stock), Under(FunctionalBlock.of(stock)), x)
    assert found["out"].dtype == dtype
    assert found["grad block.convs.0.weight"].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("track", [True, False])
def test_one_value_per_channel_is_torchs_error(track: bool, backend: str) -> None:
    x = torch.randn(1, 3, 1, 1)
    running = (torch.zeros(3), torch.ones(3)) if track else (None, None)
    sentence = "Expected more than 1 value per channel when training"
    with use_backend(backend), pytest.raises(ValueError, match=sentence):
        functional.bn_relu(x, *running, training=True)
    with pytest.raises(ValueError, match=sentence):
        functional.conv_bn_relu(x, torch.randn(2, 3, 1, 1), None, None)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch_keeps_the_running_statistics(training: bool) -> None:
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    w = torch.randn(5, 3, 3, 3, requires_grad=True)
    mean, var = torch.rand(5), torch.rand(5)
    kept = mean.clone(), var.clone()
    out = functional.conv_bn_relu(x, w, mean, var, training=training, padding=1)
    out.sum().backward()
    assert out.shape == (0, 5, 4, 4) and x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))
    assert torch.equal(mean, kept[0]) and torch.equal(var, kept[1])


def _stock_error(function: object) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.value


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(3, 4, 4), torch.randn(5, 2, 3, 3)),
        (torch.randn(2, 3, 4, 4), torch.randn(5, 2, 3, 3)),
        (torch.randn(2, 2, 4, 4).double(), torch.randn(5, 2, 3, 3)),
        (torch.randn(2, 2, 2, 2), torch.randn(5, 2, 3, 3)),
        (torch.randn(2, 2, 4, 4).long(), torch.randn(5, 2, 3, 3)),
    ],
    ids=["rank", "channels", "dtype", "kernel", "integers"],
)
def test_wrong_inputs_raise_torchs_errors(x: Tensor, weight: Tensor) -> None:
    def stock() -> Tensor:
        return F.batch_norm(F.conv2d(x, weight), None, None, training=True)

    expected = _stock_error(stock)
    with pytest.raises(type(expected)) as caught:
        functional.conv_bn_relu(x, weight, None, None, training=True)
    assert str(caught.value) == str(expected)


def test_no_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="layers must hold at least one ConvNorm, got none"):
        functional.residual_block(torch.randn(1, 1, 1, 1), [])


def test_momentum_may_be_a_tensor() -> None:
    x, pairs = torch.randn(4, 3, 2, 2), []
    for momentum in (0.25, torch.tensor(0.25)):
        mean, var = torch.zeros(3), torch.ones(3)
        functional.bn_relu(x, mean, var, training=True, momentum=momentum)
        pairs.append((mean, var))
    for a, b in zip(*pairs, strict=True):
        # One differs from the other by the rounding of a product.
        torch.testing.assert_close(a, b, rtol=2**-22, atol=2**-22)


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.5])
def test_odd_momenta_are_torchs(momentum: float) -> None:
    x, pairs = torch.randn(4, 3, 2, 2), []
    for function in (functional.bn_relu, F.batch_norm):
        mean, var = torch.full((3,), 0.5), torch.ones(3)
        function(x, mean, var, training=True, momentum=momentum)
        pairs.append((mean, var))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-21, atol=2**-21)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_inference_mode_and_no_grad_keep_nothing(backend: str) -> None:
    case = BlockCase("inference", training=False)
    stock = case.stock()
    fused, x = FunctionalBlock.of(stock), case.input()
    with use_backend(backend):
        with torch.no_grad():
            one = fused(x)
        with torch.inference_mode():
            two = fused(x)
    assert not one.requires_grad and two.is_inference()
    assert torch.equal(one, two)
