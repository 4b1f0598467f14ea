"""Parameters and statistics that are views: columns of a matrix, one value expanded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from module_parity import FusedCalls, Step, assert_same, randomise, step
from torch import Tensor, nn

import fastres
from fastres.testing.builder import column, expanded

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
View = Callable[[Tensor], Tensor]


def twins(dtype: torch.dtype, bias: bool = False) -> tuple[nn.Module, nn.Module]:
    """A fused bottleneck and its stock twin, whose convolutions may have biases."""
    fused = fastres.Bottleneck(16, 4)
    if bias:
        for name in ("conv1", "conv2", "conv3"):
            conv = getattr(fused, name)
            conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    twin = fastres.nn.stock.Bottleneck(16, 4)
    for name, child in randomise(fused).named_children():
        setattr(twin, name, copy.deepcopy(child))
    return fused.to(dtype), twin.to(dtype)


def view_as(module: nn.Module, name: str, view: View) -> None:
    """Make `view` of module.<name>."""
    value = view(getattr(module, name).detach())
    if name in module._buffers:
        module.register_buffer(name, value)
    else:
        setattr(module, name, nn.Parameter(value))


def both_steps(fused: nn.Module, twin: nn.Module, backend: str, calls: int) -> tuple[Step, Step]:
    """One step of each, of which `calls` fused."""
    x = torch.randn(5, 16, 7, 6, dtype=fused.conv1.weight.dtype)
    with FusedCalls() as counted, fastres.use_backend(backend):
        found = step(fused, x)
    assert counted.forward == calls
    return found, step(twin, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("view", [column, expanded])
@pytest.mark.parametrize("name", NORM_TENSORS)
def test_tensors_of_a_batch_norm_may_be_views(
    name: str, view: View, train: bool, backend: str, dtype: torch.dtype
) -> None:
    fused, twin = (m.train(train) for m in twins(dtype))
    for module in (fused, twin):
        for norm in ("bn1", "bn2", "bn3"):
            view_as(getattr(module, norm), name, view)
    # Values that are updated in one place depend on the order, which is torch's own: on one thread
    # it is always the same.
    stock = train and view is expanded and name.startswith("running")
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if stock else threads)
    try:
        found, expected = both_steps(fused, twin, backend, 0 if stock else 1)
    finally:
        torch.set_num_threads(threads)
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("view", [column, expanded])
def test_the_bias_of_a_convolution_may_be_a_view(
    view: View, train: bool, backend: str, dtype: torch.dtype
) -> None:
    fused, twin = (m.train(train) for m in twins(dtype, bias=True))
    for module in (fused, twin):
        for conv in ("conv1", "conv2", "conv3"):
            view_as(getattr(module, conv), "bias", view)
    assert_same(*both_steps(fused, twin, backend, 1))
    x = torch.randn(2, 16, 4, 4, dtype=dtype)
    assert_same(step(fused, x, backward=False), step(twin, x, backward=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_beside_16_bit_activations(dtype: torch.dtype) -> None:
    fused, twin = twins(torch.float32)
    for module in (fused, twin):
        for norm in ("bn1", "bn2", "bn3"):
            for name in NORM_TENSORS:
                view_as(getattr(module, norm), name, lambda t: column(t.to(dtype)))
    truth = copy.deepcopy(twin).double()
    x = torch.randn(5, 16, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found, stock = step(fused, x), step(twin, x)
    for name, want in step(truth, x.double()).items():
        if want.is_floating_point():
            slack = 8 * torch.finfo(torch.bfloat16).eps * want.abs().max()
            bound = 2 * (stock[name].double() - want).abs().max() + slack
            assert (found[name].double() - want).abs().max() <= bound, name


def test_running_statistics_are_updated_in_the_users_own_memory() -> None:
    fused, _ = twins(torch.float32)
    matrix = torch.zeros(4, 3)
    fused.bn1.register_buffer("running_mean", matrix[:, 1])
    fused(torch.randn(5, 16, 7, 6) + 1)
    assert fused.bn1.running_mean.data_ptr() == matrix[:, 1].data_ptr()
    assert bool(matrix[:, 1].all()) and not bool(matrix[:, ::2].any())


def test_a_view_gets_its_gradient_through_to_the_users_matrix() -> None:
    fused, twin = twins(torch.float64)
    x = torch.randn(3, 16, 5, 5, dtype=torch.float64)
    grads = []
    for module in (fused, twin):
        matrix = torch.linspace(0.5, 2, 12, dtype=torch.float64).view(4, 3).requires_grad_()
        torch.func.functional_call(
            module, {"bn2.weight": matrix[:, 1]}, (x,)
        ).sin().sum().backward()
        grads.append(matrix.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("train", [True, False])
def test_views_in_a_compiled_block(train: bool) -> None:
    fused, twin = (m.train(train) for m in twins(torch.float64))
    for module in (fused, twin):
        for name in NORM_TENSORS:
            view_as(module.bn2, name, column)
    x = torch.randn(3, 16, 5, 5, dtype=torch.float64)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    found = {name.replace("_orig_mod.", ""): t for name, t in step(compiled, x).items()}
    assert_same(found, step(twin, x))
