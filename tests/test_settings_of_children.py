"""Settings that torch takes or refuses: eps <= 0, numpy's scalars, tensors, tuples of one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from module_parity import raised
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres.nn import stock


def outcome(module: nn.Module, x: Tensor) -> Any:
    """What a call gives: the output with the buffers, or type and text of the error."""
    found: list[Any] = []

    def run() -> None:
        out = module(x)
        found.extend([out.detach(), *[b.clone() for b in module.buffers()]])
        raise StopIteration

    error = raised(run)
    return found if error[0] is StopIteration else error


def assert_alike(path: str, name: str, value: Any, train: bool) -> None:
    """A fused block with a setting in a child of its does what its stock twin does."""
    found = []
    for cls in (fastres.Bottleneck, stock.Bottleneck):
        torch.manual_seed(0)
        pooled = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(6, 16, 1), nn.BatchNorm2d(16))
        block = cls(6, 4, 1, pooled).train(train)
        x = torch.randn(2, 6, 5, 5)
        setattr(block.get_submodule(path), name, value)
        found.append(outcome(block, x))
    if isinstance(found[1], tuple):
        assert found[0] == found[1]
    else:
        torch.testing.assert_close(*found, equal_nan=True)


EPS = [
    0.0, -0.0, -1e-3, 1e-12, 1, True, float("nan"), float("inf"), np.float32(1e-3),
    np.float64(1e-3), np.int64(1), np.array(1e-3), torch.tensor(1e-3), torch.tensor([1e-3]),
    "1e-3", None,
]  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("path", ["bn1", "bn3", "downsample.2"])
@pytest.mark.parametrize("eps", EPS, ids=repr)
def test_eps_of_any_kind(eps: Any, path: str, train: bool) -> None:
    """torch refuses eps <= 0 in training and eps < 0 at all; fastres computed with it."""
    assert_alike(path, "eps", eps, train)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("eps", [0.0, -1e-3, np.float64(1e-3), torch.tensor(1e-3)], ids=repr)
def test_eps_of_any_kind_by_function(eps: Any, train: bool) -> None:
    x, mean, var = torch.randn(2, 4, 3, 3), torch.zeros(4), torch.ones(4)

    def own() -> Tensor:
        return F.relu(F.batch_norm(x, mean.clone(), var.clone(), None, None, train, 0.1, eps))

    def ours() -> Tensor:
        return fastres.functional.bn_relu(x, mean.clone(), var.clone(), training=train, eps=eps)

    try:
        expected = own()
    except (ValueError, TypeError):
        assert raised(ours) == raised(own)
    else:
        torch.testing.assert_close(ours(), expected)


GEOMETRY = [
    ("conv2", "stride", np.int64(1)),
    ("conv2", "stride", (np.int64(1), np.int64(1))),
    ("conv2", "stride", (1,)),
    ("conv2", "stride", [1, 1]),
    ("conv2", "stride", torch.Size([1, 1])),
    ("conv2", "stride", torch.tensor([1, 1])),
    ("conv2", "stride", (torch.tensor(1), torch.tensor(1))),
    ("conv2", "stride", (1.0, 1.0)),
    ("conv2", "padding", (1,)),
    ("conv2", "padding", np.int64(1)),
    ("conv2", "padding", (1, 1, 1)),
    ("conv2", "padding", -1),
    ("conv2", "dilation", (1,)),
    ("conv2", "dilation", torch.tensor(1)),
    ("conv2", "groups", np.int64(1)),
    ("conv2", "groups", True),
    ("conv2", "groups", 1.0),
    ("downsample.0", "kernel_size", (1,)),
    ("downsample.0", "kernel_size", np.int64(1)),
    ("downsample.0", "stride", (1,)),
    ("downsample.0", "stride", np.int64(1)),
    ("downsample.0", "padding", (0,)),
    ("downsample.0", "padding", None),
]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("path", "name", "value"), GEOMETRY, ids=repr)
def test_geometry_of_any_kind(path: str, name: str, value: Any, train: bool) -> None:
    """Tuples of one and numpy's integers raised where torch takes them."""
    assert_alike(path, name, value, train)


MOMENTA = [np.float32(0.1), np.float64(0.1), np.int64(0), True, 1, torch.tensor(0.1), "0.1"]


@pytest.mark.parametrize("momentum", MOMENTA, ids=repr)
def test_momentum_of_any_kind(momentum: Any) -> None:
    assert_alike("bn2", "momentum", momentum, True)


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [("bn2", "eps", 0.0), ("conv2", "stride", (1,)), ("downsample.0", "stride", (1,))],
    ids=repr,
)
def test_a_setting_is_the_reason(path: str, name: str, value: Any) -> None:
    pooled = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
    block = fastres.Bottleneck(16, 4, 1, pooled)
    assert fastres.explain(block).rows[0].fused
    setattr(block.get_submodule(path), name, value)
    assert name in str(block.why_not()) or "settings" in str(block.why_not())
    assert not fastres.explain(block).rows[0].fused


# ---------------------------------------------------------------- what is traced


class _Own(nn.Module):
    """Somebody's own block, which conversion traces."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


SETTINGS: list[tuple[str, str, Any]] = [
    *[("bn1", "eps", eps) for eps in EPS],
    *[("bn2", "momentum", momentum) for momentum in MOMENTA],
    *[(path.replace("conv2", "conv1"), name, value) for path, name, value in GEOMETRY
      if path == "conv2"],
]  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("path", "name", "value"), SETTINGS, ids=repr)
def test_settings_of_what_is_traced(
    path: str, name: str, value: Any, train: bool, when: str
) -> None:
    torch.manual_seed(0)
    twin = _Own().train(train)
    fused = copy.deepcopy(twin)
    if when == "after":
        fastres.convert(fused)
    for module in (twin, fused):
        setattr(module.get_submodule(path), name, value)
    if when == "before":
        fastres.convert(fused)
    x = torch.randn(2, 6, 5, 5)
    expected, found = outcome(twin, x), outcome(fused, x)
    if isinstance(expected, tuple):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, equal_nan=True)
