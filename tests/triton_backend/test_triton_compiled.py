"""Kernels compiled ahead of time for three generations of GPUs; no GPU is needed.

docs/kernels.md holds the full table; here every kernel and flag is compiled in bfloat16 for all of
them, and in the other dtypes for one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastres

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import resources  # noqa: E402
from bench.launches import NoDriver  # noqa: E402

COMBINATIONS = [("bf16", 80), ("bf16", 90), ("bf16", 100), ("fp16", 90), ("fp32", 90)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            pair,
            id=name,
            marks=[
                pytest.mark.xdist_group(name),
                *([] if pair == ("bf16", 90) else [pytest.mark.exhaustive]),
            ],
        )
        for pair in COMBINATIONS
        for name in [f"{pair[0]}-sm_{pair[1]}"]
    ],
)
def compiled(request: pytest.FixtureRequest) -> tuple[int, str, list[resources.Row]]:
    dtype, capability = request.param
    return capability, dtype, resources.rows(dtype, capability)


def test_every_kernel_is_among_them(compiled: tuple[int, str, list[resources.Row]]) -> None:
    """All but the plain addition, which no block of ResNet-50 runs on its own, the update of
    running statistics, which its own test compiles, and what needs newer hardware.
    """
    defined = {
        name
        for path in (ROOT / "triton_kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    found = {row.kernel for row in compiled[2]}
    missing = {"add_act_fwd_kernel", "update_running_kernel"}
    if not resources.DEVICES[compiled[0]].copy_engine:
        missing.add("conv1x1_fwd_kernel")
    assert defined - found == missing


def test_nothing_spills(compiled: tuple[int, str, list[resources.Row]]) -> None:
    for row in compiled[2]:
        assert row.resources.stack == row.resources.local == 0, row[:5]


def test_shared_memory_fits(compiled: tuple[int, str, list[resources.Row]]) -> None:
    capability, _, rows = compiled
    limit = resources.DEVICES[capability].shared_bytes
    assert all(row.resources.shared <= limit for row in rows)
    assert all(row.resources.registers * row.resources.warps * 32 <= 65536 for row in rows)


def test_hopper_multiplies_by_warpgroups(compiled: tuple[int, str, list[resources.Row]]) -> None:
    capability, dtype, rows = compiled
    if capability != 90 or dtype == "fp32":
        pytest.skip("wgmma is Hopper's, and for float32 products the switch is torch's")
    products = [row for row in rows if row.kernel.startswith("conv_")]
    assert len(products) > 20
    assert all("wgmma.mma_async" in row.resources.ptx for row in products)


def test_offsets_have_64_bits(compiled: tuple[int, str, list[resources.Row]]) -> None:
    """What multiplies a row by its length does so in 64 bits."""
    for row in compiled[2]:
        if row.kernel == "finalize_stats_fwd_kernel":  # per channel: no row, nothing to multiply
            continue
        wide = re.findall(r"(?:mul|mad)\.(?:lo\.s64|wide\.[su]32)|shl\.b64", row.resources.ptx)
        assert wide, row[:5]


def test_loads_of_16_bit_activations_are_16_bytes_wide(
    compiled: tuple[int, str, list[resources.Row]],
) -> None:
    capability, dtype, rows = compiled
    if dtype == "fp32":
        pytest.skip("two accesses per eight values")
    for row in rows:
        if row.kernel == "scale_shift_act_fwd_kernel" and capability == 90:
            assert "ld.global.v4.b32" in row.resources.ptx, row[:5]
            assert "st.global.v4.b32" in row.resources.ptx, row[:5]


@pytest.mark.parametrize("far", [1, 1 << 30])
def test_sizes_of_one_compile(far: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton makes a number of an argument that is 1, and a number has no methods; with pixels
    counted in 32 bits and in 64.
    """
    from fastres.kernels import Conv
    from fastres.kernels.triton import convolution, convolution_backward, products
    from fastres.kernels.triton.launch import recording
    from fastres.kernels.triton.support import pretending
    from fastres.testing.ahead import compiled

    monkeypatch.setattr(products, "_FAR", far)
    with pretending(resources.DEVICES[90]), recording() as launches:
        for channels, size, kernel, stride in ((64, 14, 3, 1), (64, 14, 3, 2), (1, 1, 1, 1)):
            conv = Conv((stride,) * 2, (kernel // 2,) * 2)
            x = torch.empty(1, channels, size, size, device="meta", dtype=torch.bfloat16)
            x = x.contiguous(memory_format=torch.channels_last)
            weight = x.new_empty(channels, channels, kernel, kernel)
            y, _ = convolution.conv_forward(x, weight, None, conv, want_state=True)
            convolution_backward.conv_backward_data(y, weight, x, conv)
            convolution_backward.conv_backward_weight(y, x, weight, conv)
    assert len(launches) >= 9
    for launch in launches:
        assert compiled(launch, 90).registers > 0


def test_one_binary_serves_all_sizes_that_align_nothing() -> None:
    """What is compiled ahead of time knows as little of them as what Triton's JIT compiles."""
    from fastres.kernels import Conv
    from fastres.kernels.triton import convolution
    from fastres.kernels.triton.launch import recording
    from fastres.kernels.triton.support import pretending
    from fastres.testing.ahead import source_of

    with pretending(resources.DEVICES[90]), recording() as launches:
        for images, size in ((1, 160), (65536, 1), (32, 48), (37, 47)):
            x = torch.empty(images, 64, size, size, device="meta", dtype=torch.bfloat16)
            x = x.contiguous(memory_format=torch.channels_last)
            convolution.conv_forward(x, x.new_empty(64, 64, 1, 1), None, Conv())
    assert len({source_of(one).hash() for one in launches}) == 1


def test_no_tile_spills_beside_what_is_read_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference with a residual: every candidate fits registers and multiplies by warpgroups."""
    from fastres.kernels import Conv
    from fastres.kernels.triton import convolution, products
    from fastres.kernels.triton.launch import recording
    from fastres.kernels.triton.support import pretending
    from fastres.testing.ahead import compiled

    def every(name: str, module: str, sizes: object, candidates: Any, run: Any, *_: Any) -> Any:
        for tile in candidates[1:]:
            run(tile)
        return candidates[0]

    monkeypatch.setattr(products, "tuned", every)
    x = torch.empty(256, 64, 56, 56, device="meta", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    y, stats = x.new_empty(256, 256, 56, 56), torch.empty(5, 256, device="meta")
    residual, weight = y.contiguous(memory_format=torch.channels_last), x.new_empty(256, 64, 1, 1)
    with pretending(resources.DEVICES[90]), recording() as launches:
        convolution.conv_bn_act(x, weight, None, Conv(), stats, residual=residual, act="relu")
    assert len(launches) > 5
    for launch in launches:
        binary = compiled(launch, 90)
        assert binary.stack == binary.local == 0, launch.constants
        assert "wgmma.mma_async" in binary.ptx, launch.constants


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Triton compiles for a Hopper GPU, with empty caches."""
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = driver._active
    driver.set_active(NoDriver())
    yield
    driver._active = before


def test_what_is_tuned_is_compiled_together(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    """Side by side, and a launch finds the binary; a candidate that fails takes nobody along."""
    from fastres.kernels import Conv
    from fastres.kernels.triton import convolution, launch
    from fastres.kernels.triton.support import pretending

    asked: list[tuple[Sequence[Any], Callable[[Any], object]]] = []

    def choice(name: str, source: str, sizes: object, candidates: Any, run: Any, *_: Any) -> Any:
        asked.append((candidates, run))
        return candidates[0]

    monkeypatch.setattr(launch, "choice", choice)
    x = torch.empty(4, 64, 56, 56, device="meta", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    with pretending(resources.DEVICES[90]), launch.recording():
        convolution.conv_forward(x, x.new_empty(64, 64, 1, 1), None, Conv(), want_state=True)
    (candidates, run), *_ = asked
    pointers = [tile for tile in candidates if not tile.descriptors][:2]
    tiles = [*pointers, next(tile for tile in candidates if tile.descriptors), "no tile"]
    with pretending(resources.DEVICES[90]):
        thunks = [partial(run, tile) for tile in tiles]
        launch.compile_together(thunks)
        with launch.recording() as launches:
            for thunk in thunks[:3]:
                thunk()
    for one in launches:
        binaries = one.kernel.device_caches[0][0]
        found = len(binaries)
        assert found == [other.kernel for other in launches].count(one.kernel)
        assert all("wgmma" in binary.asm["ptx"] for binary in binaries.values())
        given = [
            launch._stand_in(t) if isinstance(t, tuple) else t and torch.empty(16, dtype=t)
            for t in one.dtypes
        ]
        options = launch.options_of(one.max_registers)
        one.kernel.warmup(
            *given, *one.sizes, grid=one.grid, **dict(one.constants),
            num_warps=one.num_warps, num_stages=one.num_stages, **options,
        )  # fmt: skip
        assert len(binaries) == found, "a launch needs no other"


def test_amd_gpus_compile() -> None:
    """Nothing is NVIDIA's alone: an MI300's compiler takes the same kernels."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile

    from fastres.kernels.triton.support import Device
    from fastres.testing.ahead import resnet_launches, source_of

    target, local = GPUTarget("hip", "gfx942", 64), 64 << 10
    model = fastres.models.resnet50()
    device, distinct = Device(304, local), {}
    for launch in resnet_launches(model, (256, 224), torch.bfloat16, device, "c", True):
        distinct.setdefault((launch.kernel, resources.variant(launch)), launch)
    assert len(distinct) > 20
    for (kernel, variant), launch in distinct.items():
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        binary = compile(source_of(launch), target=target, options=options)
        assert "hsaco" in binary.asm, (kernel, variant)
        assert binary.metadata.shared <= local, (kernel, variant)


def test_the_table_in_the_docs_is_of_these_kernels() -> None:
    """Regenerated by `python -m bench resources`; a kernel or a variant more or less shows."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    for launch in resources.launches(torch.bfloat16, 90):
        cells = f"| `{launch.kernel.__name__}` | {resources.variant(launch)} |"
        assert cells in text, cells
