"""Whole residual blocks by the triton backend, at every level of fusion, held to torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastres
from fastres.engine import LEVELS, make_plan
from fastres.engine.plan import Signature
from fastres.testing import BLOCK_CASES, BlockCase, FunctionalBlock, check_block

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_poison")]

LARGE = 8 * 32 * 20 * 20


def _small(case: BlockCase) -> bool:
    n, c, h, w = case.shape
    return n * c * h * w < LARGE


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", [c for c in BLOCK_CASES if _small(c)], ids=str)
def test_block_is_the_stock_block(case: BlockCase, level: str, device: str) -> None:
    stock = case.stock(device)
    x = case.input(device=device).requires_grad_()
    with fastres.use_backend("triton"), fastres.use_level(level):
        check_block(stock, FunctionalBlock.of(stock), x, what=f"{level}, {case}")


@pytest.mark.parametrize("case", [c for c in BLOCK_CASES if not _small(c)], ids=str)
def test_block_in_16_bits_is_the_stock_block(case: BlockCase, device: str) -> None:
    """Large enough for several ReLUs to open in one run and not in another."""
    stock = case.stock(device)
    x = case.input(device=device).requires_grad_()
    for level in ("c'", "c"):
        with fastres.use_backend("triton"), fastres.use_level(level):
            check_block(stock, FunctionalBlock.of(stock), x, what=f"{level}, {case}")


@pytest.mark.parametrize("mode", ["speed", "lean"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_memory_modes(mode: str, kind: str, device: str) -> None:
    case = BlockCase(f"{kind}-{mode}", kind, shortcut="projection", stride=2)
    stock = case.stock(device)
    x = case.input(device=device).requires_grad_()
    for level in ("b'", "c"):
        backend, memory = fastres.use_backend("triton"), fastres.use_memory(mode)
        with backend, memory, fastres.use_level(level):
            check_block(stock, FunctionalBlock.of(stock), x, what=f"{level}, {mode}")


@pytest.mark.parametrize("case", BLOCK_CASES[::2], ids=str)
def test_block_in_inference_is_the_stock_block(case: BlockCase, device: str) -> None:
    stock = replace(case, training=False).stock(device)
    with fastres.use_backend("triton"), torch.no_grad():
        check_block(stock, FunctionalBlock.of(stock), case.input(device=device), what=str(case))


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_what_it_says(level: str, device: str) -> None:
    case = BlockCase("plan")
    module = FunctionalBlock.of(case.stock(device))
    units = tuple(module.layer(i).spec for i in range(3))
    spec = fastres.engine.BlockSpec(units, "identity", backend="triton", level=level)
    weights = tuple((*module.convs[i].weight.shape,) for i in range(3))
    plan = make_plan(spec, Signature(device, torch.float32, True, weights))
    assert plan.level == level
    for conv in plan.convs:
        assert conv is not None and conv.forward.backend == "triton"
        assert conv.stats == (level != "b")
        assert (conv.prologue is not None) == (level in ("c'", "c"))
        joint = {"c'": "grad_formed", "c": "grad_prologue"}.get(level)
        assert (conv.joint.name if conv.joint else None) == joint


def test_what_triton_declines_runs_on_torchs_convolutions(device: str) -> None:
    """Groups of 2 channels: the block still runs, and is right."""
    case = BlockCase("groups", groups=4)
    stock = case.stock(device)
    with fastres.use_backend("triton"):
        check_block(stock, FunctionalBlock.of(stock), case.input(device=device).requires_grad_())


def test_float64_is_an_error_with_its_reason(device: str) -> None:
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, device=device)
    mean, var = torch.zeros(4, dtype=x.dtype, device=device), torch.ones_like(x[0, :, 0, 0])
    with (
        fastres.use_backend("triton"),
        pytest.raises(NotImplementedError, match="dtype must be float32, bfloat16 or float16"),
    ):
        fastres.functional.bn_relu(x, mean, var, training=True)


@pytest.mark.parametrize("level", ["b'", "c"])
def test_a_block_is_captured_in_a_graph(level: str, device: str) -> None:
    if device != "cuda":
        pytest.skip("graphs are a GPU's")
    case = BlockCase("graph", dtype=torch.bfloat16, shape=(4, 64, 14, 14), width=16)
    block = FunctionalBlock.of(case.stock(device))
    x, grad = case.input(device=device).requires_grad_(), case.input("grad", device)

    def step() -> list[torch.Tensor]:
        with fastres.use_backend("triton"), fastres.use_level(level):
            out = block(x)
            return [out, *torch.autograd.grad(out, [x, *block.parameters()], grad)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_offsets_past_2_to_the_31(device: str) -> None:
    """A stem's output at batch 4096 has more elements than 32 bits count."""
    if device != "cuda":
        pytest.skip("8 GB of activations are for a GPU")
    shape = (2700, 64, 112, 112)
    y = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)
    y.normal_()
    mean, var = torch.zeros(64, device=device), torch.ones(64, device=device)
    with fastres.use_backend("triton"), torch.no_grad():
        out = fastres.functional.bn_relu(y, mean, var)
    assert torch.equal(out[-1], (y[-1].float() / (1 + 1e-5) ** 0.5).relu().bfloat16())
