"""Whole residual blocks by the triton backend, at every level of fusion, held to torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backend_checks import check_far_offsets, check_float64_is_refused, check_graph_capture

import fastres
from fastres.block import LEVELS, make_plan
from fastres.block.plan import Context
from fastres.testing import BLOCK_CASES, BlockCase, FunctionalBlock, check_block

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_poison")]

LARGE = 8 * 32 * 20 * 20


def _small(case: BlockCase) -> bool:
    n, c, h, w = case.shape
    return n * c * h * w < LARGE


@pytest.mark.grid(5)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", [c for c in BLOCK_CASES if _small(c)], ids=str)
def test_block_is_the_stock_block(case: BlockCase, level: str, device: str) -> None:
    stock = case.stock(device)
    x = case.input(device=device).requires_grad_()
    with fastres.use_backend("triton"), fastres.use_level(level):
        check_block(stock, FunctionalBlock.of(stock), x, what=f"{level}, {case}")


@pytest.mark.grid(3)
@pytest.mark.parametrize("case", [c for c in BLOCK_CASES if not _small(c)], ids=str)
def test_block_in_16_bits_is_the_stock_block(case: BlockCase, device: str) -> None:
    """Large enough for several ReLUs to open in one run and not in another."""
    stock = case.stock(device)
    x = case.input(device=device).requires_grad_()
    for level in ("c'", "c"):
        with fastres.use_backend("triton"), fastres.use_level(level):
            check_block(stock, FunctionalBlock.of(stock), x, what=f"{level}, {case}")


@pytest.mark.grid(3)
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


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", ["speed", "balanced", "lean"])
def test_frozen_norms(mode: str, level: str, device: str) -> None:
    """Then backward goes by what was activated, or by bits, and by no raw output."""
    case = BlockCase("frozen", "bottleneck", shortcut="projection", training=False)
    stock = case.stock(device)
    for name, p in stock.named_parameters():
        p.requires_grad_(p.dim() > 1 or name.endswith("bias"))
    x = case.input(device=device).requires_grad_()
    with fastres.use_backend("triton"), fastres.use_memory(mode), fastres.use_level(level):
        check_block(stock, FunctionalBlock.of(stock), x, what=f"{level}, {mode}")


@pytest.mark.grid(3)
@pytest.mark.parametrize("case", BLOCK_CASES[::2], ids=str)
def test_block_in_inference_is_the_stock_block(case: BlockCase, device: str) -> None:
    stock = replace(case, training=False).stock(device)
    with fastres.use_backend("triton"), torch.no_grad():
        check_block(stock, FunctionalBlock.of(stock), case.input(device=device), what=str(case))


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_what_it_says(level: str, device: str) -> None:
    case = BlockCase("plan")
    module = FunctionalBlock.of(case.stock(device))
    acts = enumerate(("relu", "relu", "none"))
    units = tuple(module.layer(i)._replace(act=act).layer.unit for i, act in acts)
    spec = fastres.block.Block(units, "input", act="relu", backend="triton", level=level)
    weights = tuple((*module.convs[i].weight.shape,) for i in range(3))
    plan = make_plan(spec, Context(device, torch.float32, True, weights))
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
    check_float64_is_refused("triton", device)


@pytest.mark.parametrize("level", ["b'", "c"])
def test_a_block_is_captured_in_a_graph(level: str, device: str) -> None:
    check_graph_capture("triton", level, device)


def test_offsets_past_2_to_the_31(device: str) -> None:
    check_far_offsets("triton", device)
