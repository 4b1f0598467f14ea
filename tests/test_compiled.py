"""Traced modules run fused where they are compiled, as long as what was traced holds."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from handwritten import Modes, Textbook
from module_parity import assert_same, randomise, step
from test_trace import BLOCKS, images, seeded, twins
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

import fastres
from fastres.convert.compiled import FUNCTIONS


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A module, compiled in one graph; counts what was compiled and the fused blocks in it."""

    def __init__(self, module: nn.Module) -> None:
        self.graphs = self.blocks = 0
        backend = aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)
        self.run: Any = torch.compile(module, fullgraph=True, backend=backend)

    def _forward(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        operator = torch.ops.fastres.block_forward.default
        self.graphs += 1
        self.blocks = len([node for node in graph.graph.nodes if node.target is operator])
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    def _backward(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    def step(self, x: Tensor, **options: Any) -> dict[str, Tensor]:
        found = seeded(self.run, x, **options)
        return {name.replace("_orig_mod.", ""): t for name, t in found.items()}


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "into-the-input"])
def test_blocks_are_fused(kind: str) -> None:
    """In one graph, which serves for the next batch too."""
    fused, stock = twins(kind)
    compiled, count = Compiled(fused), BLOCKS[kind][1]
    for _ in range(2):
        x = images()
        assert_same(compiled.step(x), seeded(stock, x))
        assert (compiled.graphs, compiled.blocks) == (1, count)
    for module in (fused, stock):
        module.eval()
    assert_same(compiled.step(x), seeded(stock, x))
    assert compiled.blocks == count
    assert_same(compiled.step(x, backward=False), seeded(stock, x, backward=False))
    assert compiled.blocks == count


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_backends(backend: str) -> None:
    fused, stock = [m.float() for m in twins("textbook-projection")]
    compiled: Any = torch.compile(fused, fullgraph=True, backend=backend)
    x = images(torch.float32)
    try:
        found = step(compiled, x)
    except Exception as error:
        if "compiler" in str(error).lower():
            pytest.skip("inductor finds no C++ compiler")
        raise
    assert_same({name.replace("_orig_mod.", ""): t for name, t in found.items()}, step(stock, x))


def _replaces_a_child(block: Any) -> None:
    torch.manual_seed(5)
    block.conv2 = nn.Conv2d(4, 4, 3, padding=2, dilation=2).double()


def _replaces_a_forward(block: Any) -> None:
    block.bn1.forward = lambda x: x * 2


def _replaces_its_forward(block: Any) -> None:
    block.forward = lambda x: x * 2


def _hooks(block: Any) -> None:
    block.bn2.register_forward_hook(lambda module, args, out: out * 2)


def _hooks_before(block: Any) -> None:
    block.bn1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _evaluates_a_norm(block: Any) -> None:
    block.bn1.eval()


def _changes_a_setting(block: Any) -> None:
    block.bn1.eps = 0.5


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        (_replaces_a_child, 1), (_replaces_a_forward, 1), (_replaces_its_forward, 0), (_hooks, 1),
        (_hooks_before, 1), (_evaluates_a_norm, 1), (_changes_a_setting, 1),
    ],
)  # fmt: skip
def test_changes_are_seen(change: Callable[[Any], None], blocks: int) -> None:
    """What is left to be fused after a change, is."""
    fused, stock = twins("textbook")
    compiled, x = Compiled(fused), images()
    assert_same(compiled.step(x), step(stock, x))
    for module in (fused, stock):
        change(module)
    assert_same(compiled.step(x), step(stock, x))
    assert (compiled.graphs, compiled.blocks) == (2, blocks)


class Reads(Textbook):
    """Reads an attribute, and a name of its file."""

    flag = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out = out + self.shortcut(x) if self.flag else out - self.shortcut(x)
        return F.relu(out) if SWITCHES["on"] else out


SWITCHES = {"on": True}


def _reading() -> tuple[nn.Module, nn.Module]:
    stock = randomise(Reads(4, 4)).double()
    fused = copy.deepcopy(stock)
    assert fastres.convert(fused).fused
    return fused, stock


def _sets_an_attribute(modules: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in modules:
        module.flag = False


def _sets_a_class_attribute(modules: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reads, "flag", False)


def _sets_a_global(modules: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SWITCHES, "on", False)


@pytest.mark.parametrize("change", [_sets_an_attribute, _sets_a_class_attribute, _sets_a_global])
def test_what_a_forward_reads_is_held(
    change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, stock = _reading()
    compiled, x = Compiled(fused), images()
    assert_same(compiled.step(x), step(stock, x))
    change((fused, stock), monkeypatch)
    assert_same(compiled.step(x), step(stock, x))
    assert compiled.graphs == 2


def test_both_modes_are_kept() -> None:
    stock = randomise(Modes(4, 4)).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    compiled, x = Compiled(fused), images()
    for mode in (True, False, True, False):
        assert_same(compiled.step(x), step(stock.train(mode), x)) if fused.train(mode) else None
    assert compiled.graphs == 2


def test_plans_go_with_their_module() -> None:
    before = {*FUNCTIONS.__dict__}
    fused, _ = twins("textbook")
    Compiled(fused).step(images())
    made = {*FUNCTIONS.__dict__} - before
    assert made
    torch._dynamo.reset()
    del fused
    gc.collect()
    assert not made & {*FUNCTIONS.__dict__}


def test_many_blocks_are_compiled_one_by_one() -> None:
    """Each is of its own: more than a compiler compiles one function anew."""
    stock = nn.Sequential(*[randomise(Textbook(4, 4)) for _ in range(10)]).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    for block in fused:
        block.compile(fullgraph=True, backend="eager")
    x = images()
    assert_same(step(fused, x), step(stock, x))


class Options(Textbook):
    """Takes more than a tensor."""

    def forward(self, x: Tensor, factor: Any = 1, more: Any = None) -> Tensor:
        out = super().forward(x)
        return out * factor if more is None else out * factor + more[0]


@pytest.mark.parametrize(
    ("args", "kwargs", "blocks"),
    [
        ((2.0,), {}, 1), ((), {"factor": 3}, 1), ((), {"factor": "tensor"}, 1),
        ((2, None), {}, 1), ((), {"more": [1]}, 0),
    ],
)  # fmt: skip
def test_other_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], blocks: int) -> None:
    """Plain values and tensors; with anything else the forward runs as it was written."""
    stock = randomise(Options(4, 4)).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x, tensor = images(), images()
    args = tuple([tensor if arg == "tensor" else arg for arg in args])
    kwargs = {name: tensor if arg == "tensor" else arg for name, arg in kwargs.items()}
    compiled = Compiled(fused)
    torch.testing.assert_close(compiled.run(x, *args, **kwargs), stock(x, *args, **kwargs))
    assert compiled.blocks == blocks
