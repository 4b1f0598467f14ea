"""Conversion of timm's residual networks."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
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
    if options.get("norm_layer") == "linear":
        options["norm_layer"] = partial(timm.layers.BatchNormAct2d, apply_act=False)
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
    pytest.param("BasicBlock", {"block_args": {"attn_layer": "se"}}, id="seresnet18"),
    pytest.param("Bottleneck", {"block_args": {"attn_layer": "se"}}, id="seresnet50"),
    pytest.param(
        "Bottleneck", {"block_args": {"attn_layer": "eca"}, "avg_down": True}, id="ecaresnet50d"
    ),
    pytest.param("Bottleneck", {"base_width": 128}, id="wide-resnet50"),
    pytest.param("Bottleneck", {"norm_layer": "linear"}, id="norms-without-activation"),
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
    # Behind a gate a block goes on in a second one, and its projection is one too.
    gated = [m for m in model.modules() if getattr(m, "se", None) is not None]
    more = sum(1 + (m.downsample is not None) for m in gated)
    assert calls.forward - more == report.fused == len(report.rows)
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
    stock = copy.deepcopy(model)
    row = next(row for row in fastres.convert(model).rows if row.type.endswith("stem"))
    assert (row.fused, row.reason, row.runs) == (True, "", 1)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    assert_same(step(model, x), step(stock, x))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_args": {"attn_layer": "ese"}}, "se is a EffectiveSEModule, which is not fused"),
        ({"act_layer": nn.Mish}, "act1 is a Mish, not an activation of a kernel"),
        ({"norm_layer": "layernorm2d"}, "bn1 is a LayerNorm2d, not a BatchNorm2d"),
    ],
)
def test_what_is_not_fused_as_one(timm: Any, options: dict[str, Any], reason: str) -> None:
    """Around a part that is not known everything else is fused."""
    stock = small(timm, "Bottleneck", **options)
    model = copy.deepcopy(stock)
    report = fastres.convert(model)
    rows = [row for row in report.rows if row.name.startswith("layer")]
    rows = [row for row in rows if "downsample" not in row.name]
    assert {row.reason for row in rows} == {reason} and not any(row.fused for row in rows)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with FusedCalls() as calls:
        found = step(model, x)
    assert calls.forward == sum(row.runs or row.fused for row in report.rows)
    assert bool(calls.forward) is ("norm_layer" not in options)
    assert_same(found, step(stock, x))


def test_anti_aliasing(timm: Any) -> None:
    from timm.layers import BlurPool2d

    report = fastres.convert(small(timm, "Bottleneck", aa_layer=BlurPool2d))
    reasons = {row.name: row.reason for row in report.rows if row.name.startswith("layer")}
    assert reasons["layer2.0"] == "aa is a BlurPool2d, which is not fused"
    assert reasons["layer2.1"] == ""


def seeded(model: nn.Module, x: torch.Tensor, steps: int = 2) -> dict[str, torch.Tensor]:
    """The last of several steps in a row, of random numbers that are always the same."""
    torch.manual_seed(5)
    for _ in range(steps):
        found = step(model, x)
    return found


@pytest.mark.parametrize("attention", [None, "se"])
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_stochastic_depth(timm: Any, block: str, attention: str | None) -> None:
    """Drop paths draw the random numbers that they would draw in the stock network."""
    args = {"attn_layer": attention}
    stock = small(timm, block, drop_path_rate=0.5, block_args=args)
    model = copy.deepcopy(stock)
    assert fastres.convert(model).unfused == 0
    x = torch.randn(6, 3, 33, 33, dtype=torch.float64)
    assert_same(seeded(model, x), seeded(stock, x))
    assert_same(step(model.eval(), x), step(stock.eval(), x))


def test_drop_block(timm: Any) -> None:
    """Drop blocks do nothing in evaluation, and there the blocks run fused."""
    stock = small(timm, "BasicBlock", drop_path_rate=0.5, drop_block_rate=0.3)
    model = copy.deepcopy(stock)
    fastres.convert(model)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    assert_same(seeded(model, x), seeded(stock, x))
    reasons = {row.name: row.reason for row in fastres.explain(model).rows}
    assert reasons["layer1.0"] == reasons["layer2.0"] == ""
    assert reasons["layer4.0"] == "drop_block is a DropBlock2d at work"
    with FusedCalls() as calls:
        found = step(model.eval(), x)
    assert calls.forward == len(fastres.explain(model).rows)
    assert_same(found, step(stock.eval(), x))


# ---------------------------------------------------------------- ResNetV2


def small_v2(timm: Any, **options: Any) -> nn.Module:
    options = {"norm_layer": timm.layers.BatchNormAct2d, **options}
    made = timm.models.resnetv2.ResNetV2(
        [1, 2, 1, 1], channels=(16, 24, 32, 40), num_classes=3, stem_chs=8,
        conv_layer=timm.layers.create_conv2d, **options,
    )  # fmt: skip
    return randomise(made).double()


V2 = [
    pytest.param({"basic": True}, id="resnetv2_18"),
    pytest.param({}, id="resnetv2_50"),
    pytest.param({"stem_type": "deep", "avg_down": True}, id="resnetv2_50d"),
    pytest.param({"preact": False}, id="post-activation"),
    pytest.param({"preact": False, "avg_down": True}, id="post-activation-d"),
    pytest.param({"drop_path_rate": 0.5}, id="drop-path"),
    pytest.param({"act_layer": nn.Identity}, id="linear"),
]


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("options", V2)
def test_v2_parity(timm: Any, options: dict[str, Any], mode: str) -> None:
    stock = small_v2(timm, **options).train(mode == "train")
    model = copy.deepcopy(stock)
    report = fastres.convert(model)
    x = torch.randn(4, 3, 33, 33, dtype=torch.float64)
    torch.manual_seed(3)
    with FusedCalls() as calls:
        found = step(model, x, backward=mode != "inference")
    # Beside the blocks, the network's stem of several convolutions and its last norm.
    assert calls.forward == report.fused == len(report.rows) > 5, str(report)
    torch.manual_seed(3)
    assert_same(found, step(stock, x, backward=mode != "inference"))
    assert fastres.revert(model).fused == 0


def test_v2_as_it_is_left_alone(timm: Any) -> None:
    """Group norms and standardised weights, its defaults."""
    from timm.models.resnetv2 import ResNetV2

    with torch.device("meta"):
        reasons = {row.reason for row in fastres.convert(ResNetV2([1, 1, 1, 1])).rows}
        assert reasons == {"norm1 is a GroupNormAct, not a BatchNorm2d"}
        norms = {"norm_layer": timm.layers.BatchNormAct2d}
        rows = fastres.convert(ResNetV2([1, 1, 1, 1], **norms)).rows
        assert {row.reason for row in rows if row.name} == {"conv1 is a StdConv2d, not a Conv2d"}
        rows = fastres.convert(small_v2(timm, act_layer=nn.Mish)).rows
        reason = "norm1.act is a Mish, not an activation of a kernel"
        assert {row.reason for row in rows if row.name} == {reason}


@pytest.mark.parametrize("where", ["norm2.act", "norm2.drop", "norm2", "downsample.conv"])
def test_v2_hooks_are_called(timm: Any, where: str) -> None:
    stock = small_v2(timm)
    model = copy.deepcopy(stock)
    fastres.convert(model)
    block = model.stages[1].blocks[0]
    seen: list[torch.Size] = []
    hook = lambda module, args, out: seen.append(out.shape)  # noqa: E731
    block.get_submodule(where).register_forward_hook(hook)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    assert_same(step(model, x), step(stock, x))
    assert seen and block.why_not() == f"{where} carries hooks"


def test_v2_dropout_in_a_norm(timm: Any) -> None:
    model = small_v2(timm)
    block = model.stages[1].blocks[0]
    block.norm2.drop = nn.Dropout(0.1)
    fastres.convert(model)
    row = next(row for row in fastres.explain(model).rows if row.name == "stages.1.blocks.0")
    assert row.reason == "norm2.drop is a Dropout, which is not fused"


def test_named_networks(timm: Any) -> None:
    with torch.device("meta"):
        found = {
            name: fastres.convert(timm.create_model(name))
            for name in (
                "resnet50d", "resnet26t", "seresnet50", "ecaresnet26t", "wide_resnet50_2",
                "resnetv2_18", "resnetv2_50", "resnetv2_50d",
            )
        }  # fmt: skip
    assert all(len(report.rows) >= 8 for report in found.values())
    assert all(report.unfused == 0 for report in found.values())


def test_gradient_checkpointing(timm: Any) -> None:
    stock = small(timm, "BasicBlock")
    stock.set_grad_checkpointing()
    model = copy.deepcopy(stock)
    fastres.convert(model)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    assert_same(step(model, x), step(stock, x))
