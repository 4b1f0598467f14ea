"""The activations that are built in: their formulas are torch's, everywhere."""

from __future__ import annotations

from math import inf, nan, nextafter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.kernels import activation, activations, registry
from fastres.kernels.activation import BUILT_IN
from fastres.kernels.common import ACT_CODES
from fastres.testing import check_activation

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
