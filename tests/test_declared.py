"""Blocks that are declared, and the names of classes that stand for others."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from module_parity import FusedCalls, assert_same, randomise, step
from torch import Tensor, nn

import fastres
from fastres.convert import swaps
from fastres.nn import Decline, Parts, Projection, Steps

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "blocks.md").read_text(encoding="utf-8")


def test_the_document_runs(tmp_path: Path) -> None:
    """All of its code, in one file: classes are looked for where they were written."""
    code = tmp_path / "document.py"
    code.write_text("\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)))
    done = subprocess.run([sys.executable, str(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "control flow that depends on values" in done.stdout


class Untraceable(nn.Module):
    """A bottleneck whose forward looks at values."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.reduce, self.grow = nn.Conv2d(8, 4, 1, stride), nn.Conv2d(4, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.side = nn.Conv2d(8, 8, 1, stride, bias=False) if stride > 1 else None
        self.act = nn.ReLU()

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        if image.isnan().any():
            return image
        out = self.grow(self.act(self.norms[0](self.reduce(image))))
        shortcut = image if self.side is None else self.norms[2](self.side(image))
        return self.act(self.norms[1](out) * scale + shortcut)


def describe(block: Untraceable) -> Parts | Decline:
    units = (
        Steps(block.reduce, block.norms[0], block.act),
        Steps(block.grow, block.norms[1]),
    )
    side = None if block.side is None else Projection(block.side, block.norms[2])
    return Parts(units, block.act, projection=side)


@pytest.fixture(autouse=True)
def _own_declarations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps, "_declared", {})


def pair(stride: int = 1, train: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
    """A declared block, its stock twin and an input, in float64."""
    fastres.register_block(Untraceable, describe)
    torch.manual_seed(1)
    fused = randomise(Untraceable(stride)).double().train(train)
    stock = copy.deepcopy(fused)
    assert fastres.convert(fused).fused == 1
    return fused, stock, torch.randn(3, 8, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_declared_block_is_fused(stride: int, train: bool) -> None:
    fused, stock, x = pair(stride, train)
    with FusedCalls() as calls:
        found = step(fused, x)
    assert (calls.forward, calls.backward) == (1, 1)
    assert_same(found, step(stock, x))
    torch.testing.assert_close(fused(image=x), stock(image=x))
    with FusedCalls() as calls:  # What was not declared runs as it is.
        torch.testing.assert_close(fused(x, 0.5), stock(x, 0.5))
        torch.testing.assert_close(fused(x, scale=0.5), stock(x, scale=0.5))
    assert calls.forward == 0


def test_what_is_not_declared_is_left_alone() -> None:
    class Subclass(Untraceable):
        pass

    fastres.register_block(Untraceable, describe)
    assert fastres.convert(Subclass()).fused == 0
    fastres.register_block(Subclass, describe)
    assert fastres.convert(Subclass()).fused == 1


def test_a_declaration_is_undone_and_replaced() -> None:
    fused, stock, x = pair()
    fastres.register_block(Untraceable, lambda block: Decline(block.act, "is not to be"))
    assert fastres.explain(fused).fused == 1, "what was converted stays"
    fastres.revert(fused)
    assert type(fused) is Untraceable
    report = fastres.convert(fused)
    assert report.fused == 0 and "act is not to be" in str(report)
    torch.testing.assert_close(fused(x), stock(x))


def test_what_would_run_is_compared() -> None:
    fused, stock, x = pair()
    for module in (fused, stock):
        module.norms[0].register_forward_hook(lambda m, args, out: out + 1)
    assert "norms.0 carries hooks" in fused.why_not()
    torch.testing.assert_close(fused(x), stock(x))
    fused, stock, x = pair()
    written = Untraceable.forward
    try:
        Untraceable.forward = lambda self, image: written(self, image) * 2
        torch.testing.assert_close(fused(x), stock(x))
        assert "Untraceable.forward" in fused.why_not()
    finally:
        Untraceable.forward = written


def test_a_compiled_declared_block() -> None:
    fused, stock, x = pair(train=False)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("wrong", [None, "Untraceable", torch.relu, dict, nn.ReLU()])
def test_only_classes_of_modules(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^cls must be a class of torch\.nn\.Modules, got "):
        fastres.register_block(wrong, describe)


def test_only_functions_that_describe() -> None:
    with pytest.raises(TypeError, match=r"^describe must be a function, got Parts"):
        fastres.register_block(Untraceable, Parts(()))
    fastres.register_block(Untraceable, lambda block: [block.reduce])
    block = Untraceable()
    with pytest.raises(TypeError, match=r"^describe must return Parts or a Decline, got list"):
        fastres.convert(block)
    assert type(block) is Untraceable
    fastres.register_block(Untraceable, lambda block: Parts((Steps(block.missing),)))
    assert "no such part" in str(fastres.convert(block))


# ---------------------------------------------------------------- names


def _zoo(name: str) -> list[nn.Module]:
    from conftest import load_torchvision

    load_torchvision()
    if name == "torchvision":
        from torchvision.models import resnet

        return [resnet.BasicBlock(8, 8), resnet.Bottleneck(16, 4), resnet.resnet18(num_classes=2)]
    if name == "timm":
        resnet = pytest.importorskip("timm.models.resnet")
        return [resnet.BasicBlock(8, 8), resnet.Bottleneck(16, 4)]
    hf = pytest.importorskip("transformers.models.resnet.modeling_resnet")
    return [hf.ResNetBasicLayer(8, 8), hf.ResNetBottleNeckLayer(8, 8), hf.ResNetConvLayer(3, 8)]


def _named(module: nn.Module) -> list[tuple[str, str, str, str | None]]:
    classes = [type(m) for m in module.modules()]
    return [(c.__module__, c.__qualname__, c.__name__, c.__doc__) for c in classes]


@pytest.mark.parametrize("name", ["torchvision", "timm", "transformers", "declared"])
def test_a_converted_class_bears_the_name_of_its_own(name: str) -> None:
    """No-split lists, init functions and wrapping policies go by names."""
    if name == "declared":
        fastres.register_block(Untraceable, describe)
    for module in [Untraceable()] if name == "declared" else _zoo(name):
        before, stock = _named(module), type(module)
        report = fastres.convert(module)
        assert report.changed and type(module) is not stock
        assert isinstance(module, stock) and _named(module) == before
        assert "Fused" not in repr(module)


@pytest.mark.parametrize("name", ["torchvision", "timm", "transformers", "declared"])
def test_a_converted_module_is_stored_as_its_own_class(name: str) -> None:
    if name == "declared":
        fastres.register_block(Untraceable, describe)
    for module in [Untraceable()] if name == "declared" else _zoo(name):
        fastres.convert(module)
        file = io.BytesIO()
        torch.save(module, file)
        stored = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)),
                  torch.load(io.BytesIO(file.getvalue()), weights_only=False)]  # fmt: skip
        for other in stored:
            assert [type(m) for m in other.modules()] == [type(m) for m in module.modules()]
            torch.testing.assert_close(other.state_dict(), module.state_dict())
            fastres.revert(other)
            assert not any(isinstance(m, fastres.nn.FusedModule) for m in other.modules())
        assert b"FusedBasic" not in file.getvalue()
