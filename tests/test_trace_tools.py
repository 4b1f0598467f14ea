"""Blocks that were traced, under torch's own tools and in other people's classes."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from handwritten import Textbook, vgg
from module_parity import FusedCalls, assert_same, randomise, step
from test_trace import images, twins
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastres


@pytest.mark.parametrize("kind", ["textbook-projection", "option-a", "squeeze"])
def test_compiled(kind: str) -> None:
    torch._dynamo.reset()
    fused, stock = twins(kind)
    run = torch.compile(fused, backend="aot_eager")
    x = images()
    for train in (True, False):
        fused.train(train), stock.train(train)
        torch.testing.assert_close(run(x), stock(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["textbook-projection", "squeeze", "vgg"])
@pytest.mark.parametrize("how", ["jit.trace", "fx", "export"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_see_the_users_code(kind: str, how: str) -> None:
    fused, stock = [m.eval() for m in twins(kind)]
    x = images()
    if how == "jit.trace":
        run: Any = torch.jit.trace(fused, x)
    elif how == "fx":
        run = torch.fx.symbolic_trace(fused)
        assert any("bn" in node.name or node.name == "_1" for node in run.graph.nodes)
    else:
        run = torch.export.export(fused, (x,)).module()
    torch.testing.assert_close(run(x), stock(x))


def test_autocast() -> None:
    fused, stock = [m.float() for m in twins("textbook-projection")]
    x = images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), FusedCalls() as calls:
        out = fused(x)
        expected = stock(x)
    assert calls.forward == 1 and out.dtype == expected.dtype == torch.bfloat16
    # Two bfloat16 convolutions and their norms: a few roundings of 2^-8 of values up to about 4.
    torch.testing.assert_close(out, expected, atol=0.2, rtol=0.05)


def test_functional_call_and_its_gradients() -> None:
    fused, stock = twins("textbook")
    x = images()
    for module in (fused, stock):
        module.zero_grad()
    grads = []
    for module in (fused, stock):
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        given = {name: p * factor for name, p in module.named_parameters()}
        torch.func.functional_call(module, given, (x,)).square().sum().backward()
        grads.append(factor.grad)
    torch.testing.assert_close(*grads)


def test_checkpointing() -> None:
    fused, stock = twins("textbook")
    x = images()
    assert_same(step(_Checkpointed(fused), x), step(_Checkpointed(stock), x))


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out


def test_threads() -> None:
    """A trace in one thread leaves the modules of others alone."""
    from concurrent.futures import ThreadPoolExecutor

    pairs = [twins("textbook-projection") for _ in range(4)]
    x = images()

    def run(pair: tuple[nn.Module, nn.Module]) -> bool:
        fused, stock = pair
        for i in range(6):
            fused.shortcut.extra = i
            fused.shortcut.add_module("more", nn.Identity())
            torch.testing.assert_close(fused.eval()(x), stock.eval()(x))
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, pairs))


def test_a_converted_module_is_freed() -> None:
    fused, _ = twins("textbook-projection")
    step(fused, images())
    held = weakref.ref(fused)
    del fused
    gc.collect()
    assert held() is None


class _Own(Textbook):
    """Has attributes of its own that a library might take for itself."""

    layers = "mine"

    def why_not(self) -> str:
        return "mine"

    def matched(self) -> str:
        return "mine"


def test_names_of_the_user_are_the_users() -> None:
    block = randomise(_Own(4, 4)).double()
    stock = copy.deepcopy(block)
    assert fastres.convert(block).fused == 1
    assert (block.layers, block.why_not(), block.matched()) == ("mine", "mine", "mine")
    assert fastres.explain(block).fused == 1
    x = images()
    assert_same(step(block, x), step(stock, x))


class _Sealed(Textbook):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("sealed")


def test_a_class_without_subclasses() -> None:
    stock = randomise(_Sealed(4, 4)).double()
    block = copy.deepcopy(stock)
    (row,) = fastres.convert(block).rows
    assert not row.fused and "sealed" in row.reason and type(block) is _Sealed
    x = images()
    assert_same(step(block, x), step(stock, x))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("first", ["convert", "fully_shard"])
def test_sharded(first: str, tmp_path: Any) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        stock = nn.Sequential(Textbook(4, 4), Textbook(4, 6, 2))
        model = copy.deepcopy(stock)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for change in ("convert", "shard") if first == "convert" else ("shard", "convert"):
            if change == "convert":
                assert fastres.convert(model).changed == 2
                continue
            for block in model:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        x = images(torch.float32)
        for calls in (2, 0):
            with FusedCalls() as counted:
                out = model(x)
            assert counted.forward == calls
            torch.testing.assert_close(out, stock(x))
            out.sum().backward()
            assert isinstance(model[0], FSDPModule) and isinstance(model[0], Textbook)
            stock.load_state_dict(whole(model))
            fastres.revert(model)
            assert not any(row.fused for row in fastres.explain(model).rows)
    finally:
        torch.distributed.destroy_process_group()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded model, its tensors gathered."""
    state = model.state_dict()
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def test_slices_of_a_sequential() -> None:
    """torch makes them of the class of what is sliced."""
    stock = randomise(vgg(4, 6)).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    for count in (3, 5, 7, 10):
        with FusedCalls() as calls:
            torch.testing.assert_close(fused[:count](x), stock[:count](x))
        assert calls.forward == (1 if count < 7 else 2)


def test_host_cost() -> None:
    """A traced block enters few more Python functions per call than one that is built."""
    pytest.importorskip("fastres._cpu", reason="counted on the kernels of the cpu backend")
    pytest.importorskip("fastres.bench", reason="fastres was installed before it had a bench")
    from fastres.bench.host import python_calls

    class Bottleneck(fastres.nn.stock.Bottleneck):
        pass

    Bottleneck.__module__ = __name__
    built, traced = fastres.Bottleneck(16, 4), Bottleneck(16, 4)
    assert fastres.convert(traced).fused == 1
    x = torch.randn(1, 16, 2, 2).to(memory_format=torch.channels_last)
    counts = [python_calls(lambda m=m: m(x)) for m in (built, traced)]
    assert counts[1] <= counts[0] + 24, counts
