"""What a block would call is not always what torch wrote: functions replaced, classes rebound."""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_parity import FusedCalls
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres.nn import stock

MODES = pytest.mark.parametrize("mode", ["train", "eval", "inference"])


def blocks(train: bool = True) -> tuple[nn.Module, nn.Module]:
    """A fused bottleneck with a pooled projection and its stock twin."""
    made = []
    for cls in (fastres.Bottleneck, stock.Bottleneck):
        torch.manual_seed(3)
        downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(6, 16, 1), nn.BatchNorm2d(16))
        made.append(cls(6, 4, 2, downsample).train(train))
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


def assert_as_stock(fused: nn.Module, twin: nn.Module, mode: str = "train", calls: int = 0) -> None:
    """Same output to the last bit of the stock path, which has to be what ran."""
    x = torch.randn(2, 6, 8, 8)
    with FusedCalls() as counted, torch.set_grad_enabled(mode != "inference"):
        out = fused.train(mode == "train")(x)
    assert counted.forward == calls
    torch.testing.assert_close(out, twin.train(mode == "train")(x))


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose result counts twice."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return 2 * function(*args, **kwargs)

    return replacement


def refused(*args: Any, **kwargs: Any) -> None:
    raise ValueError("refused")


#: Functions of torch that a block's children call.
FUNCTIONS = [
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.BatchNorm2d, "forward"),
    (nn.ReLU, "forward"),
    (nn.Sequential, "forward"),
    (nn.AvgPool2d, "forward"),
    (F, "conv2d"),
    (F, "batch_norm"),
    (F, "relu"),
    (F, "avg_pool2d"),
]


@MODES
@pytest.mark.parametrize(("owner", "name"), FUNCTIONS, ids=lambda v: getattr(v, "__name__", v))
def test_a_function_of_torch_that_was_replaced(
    owner: Any, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, twin = blocks()
    assert_as_stock(fused, twin, mode, calls=1)
    twin.load_state_dict(fused.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, doubled(getattr(owner, name)))
        assert_as_stock(fused, twin, mode)
        assert f"{owner.__name__}.{name}" in str(fused.why_not())
        assert f"{owner.__name__}.{name}" in str(fastres.explain(fused))
    assert fused.why_not() is None
    twin.load_state_dict(fused.state_dict())
    assert_as_stock(fused, twin, mode, calls=1)


def test_a_check_of_torch_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = blocks()
    monkeypatch.setattr(nn.BatchNorm2d, "_check_input_dim", refused)
    with pytest.raises(ValueError, match="refused"):
        fused(torch.randn(2, 6, 8, 8))


@MODES
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("conv2", "_conv_forward"),
        ("conv2", "forward"),
        ("bn3", "forward"),
        ("relu", "forward"),
        ("downsample", "forward"),
        ("downsample.0", "forward"),
        ("downsample.1", "_conv_forward"),
    ],
)
def test_a_method_replaced_on_one_child(path: str, name: str, mode: str) -> None:
    """Seamless textures: a convolution with its own _conv_forward was run as it had been."""
    fused, twin = blocks()
    for module in (fused, twin):
        child = module.get_submodule(path)
        setattr(child, name, doubled(getattr(child, name)))
    assert_as_stock(fused, twin, mode)
    assert path in str(fused.why_not()) and name in str(fused.why_not())


def test_a_check_replaced_on_one_norm() -> None:
    fused, _ = blocks()
    fused.bn1._check_input_dim = refused
    with pytest.raises(ValueError, match="refused"):
        fused(torch.randn(2, 6, 8, 8))


def test_the_forward_of_the_stock_class_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, twin = blocks()
    monkeypatch.setattr(stock.Bottleneck, "forward", doubled(stock.Bottleneck.forward))
    assert_as_stock(fused, twin)
    assert "Bottleneck.forward" in str(fastres.explain(fused))


def test_the_forward_of_one_block_replaced() -> None:
    fused, twin = blocks()
    for module in (fused, twin):
        module.forward = doubled(types.MethodType(stock.Bottleneck.forward, module))
    assert_as_stock(fused, twin)
    assert "forward replaced" in str(fastres.explain(fused))


class _Rounding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.round(x * 4) / 4)


class _Centred(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


class _Leaky(nn.LeakyReLU):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__(0.1)


@MODES
@pytest.mark.parametrize("cls", [_Rounding, _Centred, _Leaky])
def test_a_class_of_torch_rebound_before_the_block_was_built(
    cls: type, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantisation toolkits do that; the block was run as if its children were torch's."""
    name = {_Rounding: "Conv2d", _Centred: "BatchNorm2d", _Leaky: "ReLU"}[cls]
    monkeypatch.setattr(nn, name, cls)
    assert_as_stock(*blocks(), mode)


@pytest.mark.parametrize("compiled", [False, True])
def test_replacements_are_seen_by_a_compiled_block(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    fused, twin = (m.eval() for m in blocks())
    run = torch.compile(fused, backend="aot_eager") if compiled else fused
    x = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(run(x), twin(x))
    monkeypatch.setattr(nn.ReLU, "forward", doubled(nn.ReLU.forward))
    torch.testing.assert_close(run(x), twin(x))
    torch._dynamo.reset()


def separate(block: Any) -> None:
    """Three ReLUs in place of the shared one, and a forward that calls them."""
    del block.relu
    block.relu1, block.relu2, block.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + self.downsample(x)
        return self.relu3(out)

    block.forward = types.MethodType(forward, block)


def function(block: Any) -> None:
    """A plain function where the ReLU was."""
    del block.relu
    block.relu = torch.relu


def lambda_shortcut(block: Any) -> None:
    """A function in place of the shortcut's module."""
    del block.downsample
    block.downsample = lambda x: x.repeat(1, 3, 1, 1)[:, :16, ::2, ::2]


@pytest.mark.parametrize("surgery", [separate, function, lambda_shortcut])
def test_children_that_are_gone_or_are_functions(surgery: Callable[[Any], None]) -> None:
    fused, twin = blocks()
    for module in (fused, twin):
        surgery(module)
    assert_as_stock(fused, twin)
    assert not fastres.explain(fused).rows[0].fused


class TestConverted:
    """The same for blocks of torchvision, patched before and after the conversion."""

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("surgery", [separate, function, lambda_shortcut])
    def test_surgery(
        self, surgery: Callable[[Any], None], when: str, torchvision_or_skip: Any
    ) -> None:
        twin = torchvision_or_skip.Bottleneck(6, 4, 2, nn.Sequential(
            nn.Conv2d(6, 16, 1, 2), nn.BatchNorm2d(16)
        ))  # fmt: skip
        fused = copy.deepcopy(twin)
        if when == "after":
            fastres.convert(fused)
        for module in (fused, twin):
            surgery(module)
        if when == "before":
            fastres.convert(fused)
        # What the surgery made of the block is traced; a method of its own, only around its parts.
        assert_as_stock(fused, twin, calls=int(when == "before"))
        fastres.explain(fused)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_the_class_of_a_block(
        self, when: str, torchvision_or_skip: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cls = torchvision_or_skip.Bottleneck
        twin = cls(16, 4)
        fused = copy.deepcopy(twin)
        if when == "after":
            fastres.convert(fused)
        monkeypatch.setattr(cls, "forward", doubled(cls.forward))
        fastres.convert(fused)
        x = torch.randn(2, 16, 6, 6)
        torch.testing.assert_close(fused(x), twin(x))
        assert "Bottleneck.forward" in str(fastres.explain(fused))

    def test_the_stem_of_a_network(
        self, torchvision_or_skip: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cls = torchvision_or_skip.ResNet
        twin = torchvision_or_skip.resnet18(num_classes=3).eval()
        fused = copy.deepcopy(twin)
        fastres.convert(fused)
        monkeypatch.setattr(cls, "_forward_impl", doubled(cls._forward_impl))
        x = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(fused(x), twin(x))


def test_a_forward_inside_a_layer_replaced_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found in the first call does not outlive it."""
    resnet = pytest.importorskip("transformers.models.resnet.modeling_resnet")
    layer = resnet.ResNetBottleNeckLayer(16, 16).eval()
    fastres.convert(layer)
    x = torch.randn(2, 16, 5, 5)
    before = layer(x)
    monkeypatch.setattr(resnet.ResNetConvLayer, "forward", lambda self, x: self.convolution(x) * 0)
    after = layer(x)
    assert not torch.equal(before, after)
    assert "ResNetConvLayer.forward" in layer.why_not()


def test_computed_parameters_are_not_held_on_to() -> None:
    block = fastres.Bottleneck(16, 4)
    x = torch.randn(2, 16, 5, 5)
    block(x)
    factor = torch.ones((), requires_grad=True)
    given = {name: p * factor for name, p in block.named_parameters()}
    held = weakref.ref(given["conv1.weight"])
    torch.func.functional_call(block, given, (x,)).sum().backward()
    assert factor.grad is not None
    del given
    gc.collect()
    assert held() is None
