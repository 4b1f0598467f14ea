"""Conversion of torchvision's networks."""

from __future__ import annotations

import copy
import io
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from module_parity import FusedCalls, assert_same, randomise, step
from torch import Tensor, nn

import fastres


@pytest.fixture
def resnet(torchvision_or_skip: ModuleType) -> ModuleType:
    return torchvision_or_skip


def small(resnet: ModuleType, block: str = "Bottleneck", **options: Any) -> nn.Module:
    """A ResNet whose wide stages are left out: they cost time and show nothing new."""
    made = resnet.ResNet(getattr(resnet, block), [2, 2, 1, 1], num_classes=3, **options)
    made.layer3 = made.layer4 = nn.Identity()
    made.fc = nn.Linear(128 * getattr(resnet, block).expansion, 3)
    return randomise(made).double()


def images() -> Tensor:
    return torch.randn(2, 3, 21, 21, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize(
    ("block", "options"),
    [
        ("BasicBlock", {}),
        ("Bottleneck", {}),
        ("Bottleneck", {"groups": 4, "width_per_group": 16}),
        ("Bottleneck", {"width_per_group": 128}),
        ("Bottleneck", {"replace_stride_with_dilation": [True, False, False]}),
    ],
    ids=["basic", "bottleneck", "resnext", "wide", "dilated"],
)
def test_parity(resnet: ModuleType, block: str, options: dict[str, Any], mode: str) -> None:
    stock = small(resnet, block, **options).train(mode == "train")
    model = copy.deepcopy(stock)
    report = fastres.convert(model)
    assert (report.fused, report.unfused, report.changed) == (5, 0, 5)
    x = images()
    with FusedCalls() as calls:
        found = step(model, x, backward=mode != "inference")
    assert calls.forward == 5
    assert_same(found, step(stock, x, backward=mode != "inference"))


def test_resnet50_and_resnet18_convert_whole(resnet: ModuleType) -> None:
    with torch.device("meta"):
        networks = [resnet.resnet18(), resnet.resnet50(), resnet.resnext50_32x4d()]
    assert [fastres.convert(model).fused for model in networks] == [9, 17, 17]


def test_what_survives(resnet: ModuleType) -> None:
    model = small(resnet)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    seen: list[str] = []
    model.layer2.register_forward_hook(lambda *_: seen.append("layer2"))
    model.layer1[0].register_forward_hook(lambda *_: seen.append("layer1.0"))
    fastres.convert(model)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert keys == list(model.state_dict())
    assert isinstance(model, resnet.ResNet)
    assert isinstance(model.layer1[0], resnet.Bottleneck)
    before = model.conv1.weight.clone()
    model(images()).sum().backward()
    optimizer.step()
    assert seen == ["layer1.0", "layer2"]
    assert not torch.equal(before, model.conv1.weight)


def test_training_goes_on_over_conversion_and_back(resnet: ModuleType) -> None:
    stock = small(resnet, "BasicBlock")
    model = copy.deepcopy(stock)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (stock, model)]
    x = images()
    for change in (lambda m: None, fastres.convert, fastres.revert):
        change(model)
        found, expected = step(model, x), step(stock, x)
        # 2^6 for the amplification of one step's rounding errors by the next ones.
        assert_same(found, expected, factor=2**18)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(resnet: ModuleType, how: str) -> None:
    model = small(resnet)
    fastres.convert(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(model) and type(twin.layer1[0]) is type(model.layer1[0])
    x = images()
    assert_same(step(twin, x), step(model, x), factor=0)


def test_idempotent_and_reversible(resnet: ModuleType) -> None:
    model = small(resnet)
    classes = [type(m) for m in model.modules()]
    assert [fastres.convert(model).changed, fastres.convert(model).changed] == [5, 0]
    report = fastres.revert(model)
    assert (report.changed, report.fused, report.unfused) == (5, 0, 5)
    assert [type(m) for m in model.modules()] == classes
    assert fastres.revert(model).changed == 0


def test_a_hook_inside_a_block(resnet: ModuleType) -> None:
    """Grad-CAM hooks the last norm of a block: that block alone runs its stock path."""
    stock = small(resnet).eval()
    model = copy.deepcopy(stock)
    fastres.convert(model)
    seen: list[Tensor] = []
    handle = model.layer2[1].bn3.register_forward_hook(lambda m, args, out: seen.append(out))
    x = images()
    with FusedCalls() as calls:
        out = model(x)
    assert calls.forward == 4 and len(seen) == 1
    torch.testing.assert_close(out, stock(x))
    row = next(r for r in fastres.explain(model).rows if r.name == "layer2.1")
    assert (row.fused, row.reason) == (False, "bn3 carries hooks")
    handle.remove()
    assert fastres.explain(model).unfused == 0


def test_a_hook_on_the_stem(resnet: ModuleType) -> None:
    model = small(resnet)
    fastres.convert(model)
    seen: list[str] = []
    model.bn1.register_forward_hook(lambda *_: seen.append("bn1"))
    with FusedCalls() as calls:
        model(images())
    assert seen == ["bn1"] and calls.forward == 4


def test_subclasses_do_what_their_own_forward_does(resnet: ModuleType) -> None:
    class Mine(resnet.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Net(resnet.ResNet):
        pass

    stock = randomise(Net(Mine, [1, 1, 1, 1], num_classes=3)).double()
    model = copy.deepcopy(stock)
    report = fastres.convert(model)
    assert report.changed == len(report.rows) == 5
    assert {row.reason for row in report.rows} == {"", "add is not fused"}
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with FusedCalls() as calls:
        found = step(model, x)
    assert calls.forward == 5
    assert_same(found, step(stock, x))


def test_group_norm_is_left_alone(resnet: ModuleType) -> None:
    model = resnet.resnet18(norm_layer=lambda c: nn.GroupNorm(4, c))
    report = fastres.convert(model)
    assert report.changed == 0
    assert {r.reason for r in report.rows} == {"bn1 is a GroupNorm, not a BatchNorm2d"}


def test_our_blocks_in_torchvision_s_network(resnet: ModuleType) -> None:
    for block, last in ((fastres.Bottleneck, "bn3"), (fastres.BasicBlock, "bn2")):
        model = resnet.ResNet(block, [1, 1, 1, 1], num_classes=3, zero_init_residual=True)
        made = model.layer1[0]
        assert type(made) is block and isinstance(made, getattr(resnet, block.__name__))
        assert not made.get_submodule(last).weight.any()
        twin = pickle.loads(pickle.dumps(made))
        assert type(copy.deepcopy(made)) is type(twin) is type(made)
        x = torch.randn(2, 3, 33, 33)
        with FusedCalls() as calls:
            model(x)
        assert calls.forward == 4
        assert fastres.convert(model).changed == 1


def test_explain_without_conversion(resnet: ModuleType) -> None:
    report = fastres.explain(small(resnet))
    assert report.fused == 0 and {r.reason for r in report.rows} == {"not converted"}


def test_feature_extraction_still_traces(resnet: ModuleType) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    stock = small(resnet).eval()
    model = copy.deepcopy(stock)
    fastres.convert(model)
    x = images()
    names = ["layer1.0.bn3", "layer2"]
    found, expected = (create_feature_extractor(m, names)(x) for m in (model, stock))
    for name in names:
        torch.testing.assert_close(found[name], expected[name])


def test_segmentation_backbone(resnet: ModuleType) -> None:
    from torchvision.models._utils import IntermediateLayerGetter

    stock = IntermediateLayerGetter(small(resnet), {"layer2": "out"}).eval()
    model = copy.deepcopy(stock)
    assert fastres.convert(model).fused == 5
    x = images()
    with FusedCalls() as calls:
        found = model(x)
    assert calls.forward == 5 and type(found) is type(stock(x))
    torch.testing.assert_close(found["out"], stock(x)["out"])
