"""The meta device, and devices that are the default: shapes without numbers, as in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from module_parity import assert_same, step
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fastres
from fastres.nn import stock


def assert_same_shapes(fused: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and buffers of one step have the twin's shapes, strides and dtypes."""
    steps = []
    for module in (fused, twin):
        given = x.detach().clone().requires_grad_()
        out = module(given)
        out.sum().backward()
        assert given.grad is not None
        found = [out, given.grad, *[p.grad for p in module.parameters()], *module.buffers()]
        steps.append([(t.shape, t.stride(), t.dtype, t.device) for t in found])
    assert steps[0] == steps[1]
    with torch.no_grad():
        assert fused(x).shape == twin(x).shape


@pytest.mark.parametrize("train", [True, False])
def test_a_block_on_the_meta_device(train: bool) -> None:
    """There is no autocast for it: to ask whether it is at work raises."""
    fused, twin = (
        cls(16, 4).to("meta").train(train) for cls in (fastres.Bottleneck, stock.Bottleneck)
    )
    x = torch.empty(2, 16, 5, 6, device="meta")
    assert_same_shapes(fused, twin, x)
    assert fused.why_not(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_shapes(fused, twin, x)


@pytest.mark.parametrize("train", [True, False])
def test_a_block_under_the_meta_device(train: bool) -> None:
    with torch.device("meta"):
        fused, twin = (cls(16, 4).train(train) for cls in (fastres.Bottleneck, stock.Bottleneck))
        assert_same_shapes(fused, twin, torch.empty(2, 16, 5, 6))


@pytest.mark.parametrize("train", [True, False])
def test_real_tensors_stay_real_under_another_default_device(train: bool) -> None:
    fused, twin = (cls(16, 4).train(train) for cls in (fastres.Bottleneck, stock.Bottleneck))
    twin.load_state_dict(fused.state_dict())
    x = torch.randn(2, 16, 5, 6)
    expected = step(twin, x)
    out = fused(x)
    with torch.device("meta"):
        fused.zero_grad()
        again = fused(x)
    assert again.device == x.device
    if not train:
        assert_same({"out": again.detach()}, {"out": expected["out"]})
    with torch.device("meta"):
        out.backward(x)
    assert all(p.grad.device == x.device for p in fused.parameters())


def test_fake_tensors() -> None:
    with FakeTensorMode():
        fused, twin = fastres.Bottleneck(16, 4), stock.Bottleneck(16, 4)
        assert_same_shapes(fused, twin, torch.empty(2, 16, 5, 6))


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bn_relu": lambda x, c: fastres.functional.bn_relu(x, c, c, training=True),
    "bn_add_relu": lambda x, c: fastres.functional.bn_add_relu(x, x, c, c),
    "add_relu": lambda x, c: fastres.functional.add_relu(x, x),
    "conv_bn_relu": lambda x, c: fastres.functional.conv_bn_relu(x, x.new_empty(4, 4, 1, 1), c, c),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_on_the_meta_device(name: str) -> None:
    x, c = torch.empty(2, 4, 3, 3, device="meta", requires_grad=True), torch.empty(4, device="meta")
    out = FUNCTIONS[name](x, c)
    out.sum().backward()
    assert out.is_meta and x.grad is not None and x.grad.shape == out.shape == x.shape


def test_a_network_on_the_meta_device() -> None:
    with torch.device("meta"):
        network = fastres.models.resnet18(num_classes=3)
    x = torch.empty(2, 3, 64, 64, device="meta")
    assert network(x).shape == (2, 3)
    assert all(row.fused for row in fastres.explain(network, x).rows)
