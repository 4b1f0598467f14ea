"""Conversion of transformers' ResNet."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import pytest
import torch
from module_parity import FusedCalls, assert_same, randomise, step
from torch import nn

import fastres


@pytest.fixture(scope="module")
def transformers() -> Any:
    from conftest import load_torchvision

    with contextlib.suppress(ImportError):
        load_torchvision()
    return pytest.importorskip("transformers")


def small(transformers: Any, **options: Any) -> nn.Module:
    config = transformers.ResNetConfig(
        **{
            "embedding_size": 8,
            "hidden_sizes": [16, 24],
            "depths": [2, 1],
            "num_labels": 3,
            **options,
        }
    )
    return randomise(transformers.ResNetForImageClassification(config)).double()


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize(
    "options",
    [
        {"layer_type": "basic"},
        {"layer_type": "bottleneck"},
        {"layer_type": "bottleneck", "downsample_in_bottleneck": True},
        {"layer_type": "basic", "downsample_in_first_stage": True},
    ],
    ids=["basic", "bottleneck", "strided-1x1", "downsampling"],
)
def test_parity(transformers: Any, options: dict[str, Any], mode: str) -> None:
    stock = small(transformers, **options).train(mode == "train")
    model = copy.deepcopy(stock)
    report = fastres.convert(model)
    assert (report.fused, report.unfused, report.changed) == (4, 0, 4)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with FusedCalls() as calls:
        found = step(model, x, backward=mode != "inference")
    assert calls.forward == 4
    assert_same(found, step(stock, x, backward=mode != "inference"))
    assert fastres.revert(model).changed == 4
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_another_activation(transformers: Any) -> None:
    """A class of transformers' own that calls torch's function: the layers are traced instead."""
    stock = small(transformers, hidden_act="gelu")
    model = copy.deepcopy(stock)
    report = fastres.convert(model)
    assert report.unfused == 0, str(report)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with FusedCalls() as calls:
        found = step(model, x)
    assert calls.forward == sum(row.runs or row.fused for row in report.rows) == report.fused
    assert_same(found, step(stock, x))


@pytest.mark.parametrize("target", ["layer", "layer.1", "layer.1.normalization", "shortcut"])
def test_hooks_inside_a_layer(transformers: Any, target: str) -> None:
    stock = small(transformers)
    model = copy.deepcopy(stock)
    fastres.convert(model)
    seen: list[str] = []
    for network in (model, stock):
        layer = network.resnet.encoder.stages[0].layers[0]
        layer.get_submodule(target).register_forward_hook(lambda *_: seen.append(target))
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with FusedCalls() as calls:
        found = step(model, x)
    assert seen and calls.forward == 3
    assert_same(found, step(stock, x))


def test_replaced_parts_of_a_layer(transformers: Any) -> None:
    stock = small(transformers)
    model = copy.deepcopy(stock)
    fastres.convert(model)
    for network in (model, stock):
        layer = network.resnet.encoder.stages[0].layers[1].layer
        layer[0] = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double()
        network.resnet.encoder.stages[0].layers[0].layer[2].activation = nn.ReLU()
    for network in (model, stock):
        torch.manual_seed(1)
        for p in network.resnet.encoder.stages[0].layers[1].layer[0].parameters():
            nn.init.uniform_(p)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    assert_same(step(model, x, backward=False), step(stock, x, backward=False))
    reasons = [row.reason for row in fastres.explain(model).rows if not row.fused]
    # An activation in front of the addition is a step like any other.
    assert reasons == ["layer is not a Sequential of ResNetConvLayer"]


def test_layers_are_called_by_keyword(transformers: Any) -> None:
    """Tools that run a network layer by layer give arguments by the stock class's names."""
    stock = small(transformers).eval()
    model = copy.deepcopy(stock)
    fastres.convert(model)
    for path, channels in (("encoder.stages.0.layers.0", 8), ("embedder.embedder", 3)):
        own, other = (net.resnet.get_submodule(path) for net in (stock, model))
        (name,) = inspect.signature(own.forward).parameters
        x = torch.randn(2, channels, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(other(**{name: x}), own(**{name: x}))


def test_save_pretrained(transformers: Any, tmp_path: Any) -> None:
    model = small(transformers).eval()
    fastres.convert(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.ResNetForImageClassification.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 33, 33)
    torch.testing.assert_close(loaded.double().eval()(x.double()).logits, model(x.double()).logits)
