"""Conversion of timm's residual networks."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from module_parity import FusedCalls, assert_same, randomise, step
from torch import nn

import fastres


@pytest.fixture(scope="module")
def timm() -> Any:
    # timm imports torchvision, whose compiled module may not fit the torch at hand.
    from conftest import load_torchvision

    with contextlib.suppress(ImportError):
        load_torchvision()
    return pytest.importorskip("timm")


def small(timm: Any, block: str, **options: Any) -> nn.Module:
    resnet = timm.models.resnet
    made = resnet.ResNet(
        getattr(resnet, block), [1, 2, 1, 1], num_classes=3, channels=(8, 16, 24, 32), **options
    )
    return randomise(made).double()


VARIANTS = [
    pytest.param("BasicBlock", {}, id="resnet18"),
    pytest.param("Bottleneck", {}, id="resnet50"),
    pytest.param(
        "Bottleneck",
        {"stem_type": "deep", "stem_width": 32, "avg_down": True},
        id="resnet50d",
    ),
    pytest.param(
        "Bottleneck",
        {"stem_type": "deep_tiered", "stem_width": 32, "avg_down": True},
        id="resnet26t",
    ),
    pytest.param("Bottleneck", {"cardinality": 4, "base_width": 32}, id="resnext"),
    pytest.param("Bottleneck", {"output_stride": 8}, id="dilated"),
    pytest.param("BasicBlock", {"output_stride": 8}, id="dilated-basic"),
]


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize(("block", "options"), VARIANTS)
def test_parity(timm: Any, block: str, options: dict[str, Any], mode: str) -> None:
    stock = small(timm, block, **options).train(mode == "train")
    model = copy.deepcopy(stock)
    report = fastres.convert(model)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with FusedCalls() as calls:
        found = step(model, x, backward=mode != "inference")
    assert calls.forward == report.fused == len(report.rows)
    assert report.fused >= 5
    assert_same(found, step(stock, x, backward=mode != "inference"))
    assert fastres.revert(model).fused == 0


@pytest.mark.parametrize("options", [{}, {"stem_type": "deep", "stem_width": 16}], ids=str)
def test_the_stem(timm: Any, options: dict[str, Any]) -> None:
    """One convolution or three; what is not timm's plain forward runs as it is."""
    stock = small(timm, "BasicBlock", **options)
    model = copy.deepcopy(stock)
    report = fastres.convert(model)
    row = next(row for row in report.rows if row.type.endswith("stem"))
    assert (row.name, row.type, row.fused) == ("", "timm.ResNet stem", True)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    for found, expected in zip(
        model.forward_intermediates(x, intermediates_only=True),
        stock.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    seen: list[torch.Size] = []
    model.conv1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert_same(step(model, x), step(stock, x))
    assert seen, "a hook sees what it saw"
    row = next(row for row in fastres.explain(model).rows if row.type.endswith("stem"))
    assert row.reason == "conv1 carries hooks"


def test_a_stem_of_other_parts(timm: Any) -> None:
    model = small(timm, "BasicBlock", stem_type="deep", stem_width=16)
    model.conv1.append(nn.Dropout(0.0))
    row = next(row for row in fastres.convert(model).rows if row.type.endswith("stem"))
    assert row.reason == "conv1 is not a chain of convolutions, batch norms and activations"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_args": {"attn_layer": "se"}}, "se is a SEModule, which is not fused"),
        ({"act_layer": nn.SiLU}, "act1 is a SiLU, not a ReLU"),
        ({"norm_layer": "layernorm2d"}, "bn1 is a LayerNorm2d, not a BatchNorm2d"),
    ],
)
def test_what_is_left_alone(timm: Any, options: dict[str, Any], reason: str) -> None:
    model = small(timm, "Bottleneck", **options)
    report = fastres.convert(model)
    rows = [row for row in report.rows if row.name.startswith("layer")]
    assert {row.reason for row in rows} == {reason} and not any(row.fused for row in rows)


def test_anti_aliasing(timm: Any) -> None:
    from timm.layers import BlurPool2d

    report = fastres.convert(small(timm, "Bottleneck", aa_layer=BlurPool2d))
    reasons = {row.name: row.reason for row in report.rows if row.name.startswith("layer")}
    assert reasons["layer2.0"] == "aa is a BlurPool2d, which is not fused"
    assert reasons["layer2.1"] == ""


def test_stochastic_depth(timm: Any) -> None:
    """Drop paths and drop blocks do nothing in evaluation, and there the blocks run fused."""
    stock = small(timm, "BasicBlock", drop_path_rate=0.5, drop_block_rate=0.3)
    model = copy.deepcopy(stock)
    fastres.convert(model)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    torch.manual_seed(5)
    found = step(model, x)
    torch.manual_seed(5)
    assert_same(found, step(stock, x))
    reasons = {row.name: row.reason for row in fastres.explain(model).rows}
    assert reasons["layer1.0"] == ""
    assert reasons["layer2.0"] == "drop_path is a DropPath at work"
    assert reasons["layer4.0"] == "drop_block is a DropBlock2d at work"
    with FusedCalls() as calls:
        found = step(model.eval(), x)
    assert calls.forward == len(fastres.explain(model).rows)
    assert_same(found, step(stock.eval(), x))


def test_named_networks(timm: Any) -> None:
    with torch.device("meta"):
        found = {
            name: fastres.convert(timm.create_model(name)) for name in ("resnet50d", "resnet26t")
        }
    assert all(report.unfused == 0 for report in found.values())


def test_gradient_checkpointing(timm: Any) -> None:
    stock = small(timm, "BasicBlock")
    stock.set_grad_checkpointing()
    model = copy.deepcopy(stock)
    fastres.convert(model)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    assert_same(step(model, x), step(stock, x))
