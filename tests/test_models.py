"""fastres.models against torchvision's networks of the same names."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from module_parity import FusedCalls, assert_same, raised, step
from torch import nn

import fastres
from fastres import models

NAMES = [name for name in models.__all__ if name != "ResNet"]


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes(name: str, torchvision_or_skip: ModuleType) -> None:
    with torch.device("meta"):
        ours = getattr(models, name)(num_classes=7)
        theirs = getattr(torchvision_or_skip, name)(num_classes=7)
    shapes = [[(k, v.shape, v.dtype) for k, v in m.state_dict().items()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    geometry = [
        [(n, repr(c)) for n, c in m.named_modules() if isinstance(c, nn.Conv2d | nn.MaxPool2d)]
        for m in (ours, theirs)
    ]
    assert geometry[0] == geometry[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"num_classes": 3}),
        ("resnet18", {"num_classes": 3, "zero_init_residual": True}),
        (
            "resnet50",
            {
                "num_classes": 3,
                "zero_init_residual": True,
                "replace_stride_with_dilation": [False, True, True],
                "norm_layer": lambda c: nn.BatchNorm2d(c, momentum=0.3),
            },
        ),
    ],
)
def test_same_seed_same_network(
    name: str, options: dict[str, Any], torchvision_or_skip: ModuleType
) -> None:
    torch.manual_seed(3)
    ours = getattr(models, name)(**options)
    torch.manual_seed(3)
    theirs = getattr(torchvision_or_skip, name)(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    x = torch.randn(2, 3, 33, 33)
    with FusedCalls() as calls:
        found = step(ours, x)
    blocks = sum(isinstance(m, fastres.BasicBlock | fastres.Bottleneck) for m in ours.modules())
    assert calls.forward == calls.backward == blocks + 1
    assert_same(found, step(theirs, x))


def test_group_norm_runs_unfused(torchvision_or_skip: ModuleType) -> None:
    options = {"num_classes": 3, "norm_layer": lambda c: nn.GroupNorm(8, c)}
    torch.manual_seed(3)
    ours = models.resnet18(**options)
    torch.manual_seed(3)
    theirs = torchvision_or_skip.resnet18(**options)
    x = torch.randn(2, 3, 33, 33)
    assert torch.equal(ours(x), theirs(x))
    assert fastres.explain(ours).fused == 0


def test_errors_are_torchvision_s(torchvision_or_skip: ModuleType) -> None:
    wrong = [{"replace_stride_with_dilation": [True]}, {"groups": 2}]
    for options in wrong:
        theirs = raised(lambda options=options: torchvision_or_skip.resnet18(**options))
        assert raised(lambda options=options: models.resnet18(**options)) == theirs


def test_it_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    model = models.ResNet(fastres.BasicBlock, [1, 1, 1, 1], num_classes=3).double()
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    expected = step(model, x, backward=False)["out"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, x)["out"], expected)


def test_it_learns() -> None:
    model = models.ResNet(fastres.BasicBlock, [1, 1, 1, 1], num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x = torch.randn(16, 3, 32, 32)
    y = (x.mean((1, 2, 3)) > 0).long()
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 < losses[0]
