"""The activations that are built in: their formulas are torch's, everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from math import inf, nan, nextafter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.functional import bn_act
from fastres.kernels import (
    Branch,
    Gate,
    acc_dtype,
    activation,
    activations,
    implementations,
    registry,
)
from fastres.kernels.activation import BUILT_IN
from fastres.kernels.common import ACT_CODES
from fastres.testing import check_activation

try:
    _cpu = import_module("fastres._cpu")
except ImportError:
    _cpu = None

TORCHS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}
#: The kinks, both signs of zero, what lies next to them, and where exponentials end.
POINTS = [-3.0, -0.0, 0.0, 3.0, 6.0]
POINTS += [nextafter(p, way) for p in POINTS for way in (-inf, inf)]
POINTS += [inf, -inf, nan, 1e300, -1e300, 1e-310, -1e-310, 88.7, -88.7, 710.0, -710.0]


def points() -> Tensor:
    torch.manual_seed(0)
    v = torch.tensor(POINTS, dtype=torch.float64)
    return torch.cat([v, 4 * torch.randn(4096, dtype=torch.float64)]).requires_grad_()


def test_these_are_built_in() -> None:
    assert set(BUILT_IN) == set(ACT_CODES) == {"none", *TORCHS}
    assert sorted(ACT_CODES.values()) == list(range(len(ACT_CODES)))
    registry.load_extensions()
    assert set(activations()) >= set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_formulas_agree(name: str) -> None:
    check_activation(name)


@pytest.mark.parametrize("name", TORCHS)
def test_values_are_torchs(name: str) -> None:
    v = points().detach()
    found, want = activation(name).forward(v), TORCHS[name](v)
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
    same = torch.signbit(found) == torch.signbit(want)
    assert bool((same | found.isnan()).all())


@pytest.mark.parametrize("name", TORCHS)
def test_derivatives_are_torchs(name: str) -> None:
    """At the kinks too, and where they are infinite or no numbers."""
    v, known = points(), TORCHS[name]
    (want,) = torch.autograd.grad(known(v).sum(), v)
    v = v.detach()
    found = activation(name).derivative(v)
    if name == "hardswish" and not hasattr(torch, "float8_e8m0fnu"):  # torch before 2.7
        found, want = found[v.abs() != 3], want[v.abs() != 3]
    # The smooth ones round a handful of terms of the size of v; the others have two values.
    exact = activation(name).gate is not None or name == "leaky_relu"
    size = 0.0 if exact else 64 * torch.finfo(v.dtype).eps
    torch.testing.assert_close(found, want, rtol=size, atol=16 * size, equal_nan=True)


@pytest.mark.parametrize("name", [n for n in BUILT_IN if activation(n).gate is not None])
def test_gates_are_the_derivative_of_what_is_stored(name: str) -> None:
    v = points().detach()
    gate = activation(name).gate
    assert gate is not None
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        stored = v.to(dtype)
        opened = gate(activation(name).forward(stored))
        assert torch.equal(opened.to(dtype), activation(name).derivative(stored))


@pytest.fixture(params=_cpu.isas() if _cpu else [None])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param is None:
        pytest.skip("fastres._cpu was not built")
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TORCHS)
def test_cpu_kernels_are_right_at_the_edges(name: str, dtype: torch.dtype, isa: str) -> None:
    """Kinks, infinities, NaN and what is next to them, with a scale of 1 and a shift of 0."""
    v = points().detach().to(dtype).view(1, 1, 1, -1)
    acc = acc_dtype(dtype)
    stats = torch.tensor([[0.0], [1.0], [1.0], [1.0], [0.0]], dtype=acc)
    formulas = activation(name)
    (forward,) = implementations("scale_shift_act", "cpu")
    (backward,) = implementations("bn_act_backward_apply", "cpu")
    out, _ = forward.run(v, stats, act=name)
    sums = torch.zeros(3, 1, dtype=torch.float64)
    branches, one = (Branch(v, stats),), torch.ones_like(v)
    gate = Gate("affine", None, name)
    (grad,), _ = backward.run(one, gate, branches, sums, 0, want_grads=(True,))
    eps = torch.finfo(dtype).eps
    for result, want in (
        (out, formulas.forward(v.double()).to(dtype)),
        (grad, formulas.derivative(v.to(acc)).to(dtype)),
    ):
        torch.testing.assert_close(result, want, rtol=64 * eps, atol=64 * eps, equal_nan=True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", TORCHS)
def test_batch_norm_with_it_is_torchs(name: str, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(4, 19, 5, 5)).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(x.shape, dtype=dtype)
    weight, bias = torch.rand(19, dtype=dtype) + 2, torch.randn(19, dtype=dtype)
    found = []
    for fused in (True, False):
        mean, var = torch.zeros(19, dtype=dtype), torch.ones(19, dtype=dtype)
        given = [t.clone().requires_grad_() for t in (x, weight, bias)]
        if fused:
            out = bn_act(given[0], mean, var, *given[1:], training=training, act=name)
        else:
            z = F.batch_norm(given[0], mean, var, *given[1:], training=training)
            out = TORCHS[name](z)
        found.append([out, *torch.autograd.grad(out, given, grad), mean, var])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
