"""Launch shapes, and launches that are bound once: with a driver that only counts."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")

from fastres.triton_kernels import conv
from fastres.triton_kernels.tiling import Tiling, tilings

from fastres.kernels import common, implementations
from fastres.kernels.triton import (
    convolution,
    convolution_backward,
    launch,
    products,
    support,
    tiling,
)
from fastres.kernels.triton.support import Device, Matrix
from fastres.testing import CASES, check_implementation

#: From 64 channels at 112x112 to 2048 at 7x7, and wide and short ones.
SHAPES = [
    (256 * 112 * 112, 64), (256 * 56 * 56, 256), (256 * 7 * 7, 2048), (2, 4096), (1, 100000),
    (1_000_000, 3), (1, 1),
]  # fmt: skip


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_programs_cover_the_matrix_and_fill_the_device(
    rows: int, cols: int, channels_last: bool
) -> None:
    if not channels_last:
        rows, cols = cols, rows
    row_bytes = -(-cols // 8)
    for shape in tilings(rows, row_bytes, channels_last, 132):
        chunk = shape.chunk(channels_last)
        chunks = shape.chunks(rows, row_bytes, channels_last)
        assert (chunks - 1) * chunk < (rows if channels_last else row_bytes) <= chunks * chunk
        (programs,) = shape.grid(rows, row_bytes, channels_last)
        # Enough programs for the device wherever there is work for them: one per channel is 25
        # times too few for a short and wide input.
        work = rows * row_bytes * 8 / (shape.block_rows * shape.block_bytes * 8)
        assert programs >= min(132 * 2, work / 4), shape


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_shared_memory(itemsize: int, shared: int) -> None:
    for rows, columns, depth in itertools.product((1, 784, 802816), (3, 64, 2048), (3, 64, 2048)):
        found = conv.tiles(rows, columns, depth, itemsize, 132, shared)
        assert found and len(set(found)) == len(found)
        assert all(t.shared_bytes(itemsize) <= shared for t in found)
        assert all(min(t[:3]) >= 16 for t in found), "the matrix units take 16 at least"


def test_the_heuristic_fills_the_device_where_it_can() -> None:
    best = conv.tiles(256 * 7 * 7, 512, 2048, 2, 132, 227 << 10)[0]
    assert -(-256 * 49 // best.m) * -(-512 // best.n) >= 132


@pytest.mark.gpu
@pytest.mark.grid(3)
@pytest.mark.parametrize("index", range(len(conv._TILES)))
def test_every_candidate_tile_is_right(
    index: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one alone, forward and backward, on a case that is no multiple of it."""
    monkeypatch.setattr(conv, "_TILES", (conv._TILES[index],))
    products._tiles.cache_clear()
    case = next(c for c in CASES if c.name == "stride2-f32-nhwc")
    for primitive in ("conv_forward", "conv_backward_data", "conv_backward_weight", "conv_bn_act"):
        for entry in implementations(primitive, "triton"):
            assert check_implementation(entry, case, device=device).ran
    products._tiles.cache_clear()


@pytest.mark.gpu
@pytest.mark.grid(3)
@pytest.mark.parametrize("shape", [
    Tiling(2, 4, 3, 1), Tiling(16, 1, 2, 4), Tiling(32, 16, 1, 4), Tiling(64, 2, 64, 4),
], ids=str)  # fmt: skip
def test_every_kind_of_tiling_is_right(
    shape: Tiling, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "_tilings", lambda *_: [shape])
    for case in (c for c in CASES if c.name.startswith("normal-2x3x5x7-f32")):
        for primitive in ("channel_stats", "scale_shift_act", "bn_act_backward_reduce",
                          "bn_act_backward_apply", "add_act", "act_backward"):  # fmt: skip
            for entry in implementations(primitive, "triton"):
                assert check_implementation(entry, case, device=device).ran


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["1x1wide-f32-nhwc", "1x1wide-bf16-nhwc", "1x1-f32-nhwc"])
def test_the_kernel_with_tensor_descriptors_is_right(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a candidate that nothing unmeasured takes: here the last one is taken."""
    ran = []

    def last(*args: object) -> object:
        candidates = args[3]
        ran.append(candidates[-1].descriptors)
        return candidates[-1]

    if device == "cuda" and not support.device_of(torch.zeros(1, device=device)).copy_engine:
        pytest.skip("no copy engine before Hopper")
    monkeypatch.setattr(products, "tuned", last)
    case = next(c for c in CASES if c.name == name)
    (entry,) = implementations("conv_forward", "triton")
    assert {"plain", "stats", "both"} <= {*check_implementation(entry, case, device=device).ran}
    assert any(ran)


@pytest.mark.gpu
def test_parameters_may_be_views(device: str) -> None:
    """Every second element of a tensor, and one element for all channels."""
    from fastres.kernels import Conv
    from fastres.kernels.triton import batch_norm

    wide = torch.randn(32, device=device)
    mean, var, weight, bias = wide[::2], wide[1::2].abs(), wide[::2] + 1, wide[:1].expand(16)
    dense = [t.clone() for t in (mean, var, weight, bias)]
    found = []
    for m, v, w, b in ((mean, var, weight, bias), dense):
        found.append(batch_norm.finalize_stats(None, 1, (m, v), w, b, 1e-5, acc=torch.float32))
    assert torch.equal(*found)
    x, kernel = torch.randn(2, 8, 3, 3, device=device), torch.randn(16, 8, 1, 1, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = [convolution.conv_forward(x, kernel, b, Conv())[0] for b in (bias, dense[3])]
    assert torch.equal(*y)


@pytest.mark.gpu
def test_an_empty_batch_has_sums_of_zero(device: str) -> None:
    from fastres.kernels import Branch, Conv, Gate

    x = torch.empty(0, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    weight, stats = torch.randn(16, 16, 1, 1, device=device), torch.ones(5, 16, device=device)
    below = (Gate("affine"), Branch(x, stats))
    given = convolution_backward.Incoming.formed(x)
    grad, sums = convolution_backward.data_gradient(given, weight, x, Conv(), None, below)
    assert grad.shape == x.shape and sums is not None and not sums.any()


def test_the_newer_switch_for_tf32_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(conv, "fp32_precision"):
        pytest.skip("this torch has no such switch")
    before = conv.fp32_precision
    try:
        for precision, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            conv.fp32_precision = precision
            assert common.precision_of(torch.float32) == expected
            assert common.precision_of(torch.bfloat16) == "ieee"
    finally:
        conv.fp32_precision = before


# ---------------------------------------------------------------- bound launches


class CountingKernel:
    """Stands for a JIT kernel: `kernel[grid](...)` compiles, `compiled[grid]` is a bound launch."""

    def __init__(self) -> None:
        self.compiled: list[tuple[object, ...]] = []
        self.launched: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        def first(*args: object, **options: object) -> dict[tuple[int, ...], object]:
            self.compiled.append(args)
            self.launched.append((grid, *args))
            full = (*grid, 1, 1)
            return {full: lambda *given: self.launched.append((full, *given))}

        return first


def _bound_launch(kernel: CountingKernel, t: torch.Tensor, size: int, flag: bool) -> None:
    launch._launch_bound(kernel, (4,), (t, None), (size,), {"FLAG": flag}, 4, 2, None, t.device)


def test_a_launch_is_bound_once_per_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_bound", {})
    kernel, t = CountingKernel(), torch.zeros(64)
    for _ in range(3):
        _bound_launch(kernel, t, 8, True)
    assert len(kernel.compiled) == 1 and len(kernel.launched) == 3
    assert kernel.launched[1][0] == (4, 1, 1)
    assert kernel.launched[1][1] is t and kernel.launched[1][2:] == (None, 8, True)
    _bound_launch(kernel, t, 8, False)  # another constant
    _bound_launch(kernel, t, 9, True)  # another size
    _bound_launch(kernel, t[1:], 8, True)  # another alignment
    _bound_launch(kernel, t.double(), 8, True)  # another dtype
    assert len(kernel.compiled) == 5


def test_bound_launches_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_bound", {})
    monkeypatch.setattr(launch, "_MOST_BOUND", 4)
    kernel, t = CountingKernel(), torch.zeros(64)
    for size in range(20):
        _bound_launch(kernel, t, size, True)
    assert len(launch._bound) <= 4


def test_an_empty_grid_is_not_launched() -> None:
    launch.launch(None, (0,), (torch.zeros(1),), (), {})


def test_recording_runs_nothing() -> None:
    with launch.recording() as found:
        launch.launch("kernel", (3,), (torch.zeros(2), None), (5, 0.5), {"A": 1}, num_warps=8)
    (one,) = found
    assert one.kernel == "kernel" and one.grid == (3,) and one.sizes == (5, 0.5)
    assert one.dtypes == (torch.float32, None) and one.constants == (("A", 1),)


def test_every_candidate_is_recorded_where_they_are_compiled_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "source_hash", str)
    monkeypatch.setattr(launch, "choice", lambda name, source, sizes, candidates, *_: candidates[1])
    t = torch.zeros(2)

    def run(tile: int) -> None:
        launch.launch("kernel", (tile,), (t,), (), {})

    def tuned() -> int:
        found: int = launch.tuned("kernel", "conv", (), (1, 2, 3), run, t.device)
        run(found)
        return found

    with launch.recording() as found:
        assert tuned() == 2
    assert [one.grid for one in found] == [(2,)]
    with launch.recording(every=True) as found:
        tuned()
    assert {one.grid for one in found} == {(1,), (2,), (3,)}


# ---------------------------------------------------------------- where it can run


def _why_not(monkeypatch: pytest.MonkeyPatch, found: str | None) -> str | None:
    support._why_not_triton.cache_clear()
    monkeypatch.setattr(support, "find_spec", lambda name: None if found is None else object())
    monkeypatch.setattr(support, "version", lambda name: found)
    try:
        return support._why_not_triton()
    finally:
        support._why_not_triton.cache_clear()


def test_a_missing_or_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install triton" in str(_why_not(monkeypatch, None))
    assert "3.3 or newer, got 2.1.0" in str(_why_not(monkeypatch, "2.1.0"))
    assert _why_not(monkeypatch, "3.7.1") is None
    assert _why_not(monkeypatch, "3.10.0+git1") is None


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    support._why_not_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "compute capability 8.0 or newer, got 7.5" in str(support._why_not_gpu(0))
    support._why_not_gpu.cache_clear()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="there it does run")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it does run")
def test_asking_for_it_by_name_raises_with_the_reason() -> None:
    import fastres

    with (
        pytest.raises(RuntimeError, match="'triton' cannot run here: there is no GPU"),
        fastres.use_backend("triton"),
    ):
        pass
    x = torch.randn(2, 16, 4, 4)
    assert fastres.Bottleneck(16, 4)(x).shape == x.shape, "auto goes on without"


def test_a_pretended_device_is_asked_for_shapes() -> None:
    with support.pretending(Device(7, 1234)):
        assert support.device_of(torch.zeros(1)) == Device(7, 1234)
        assert support.why_not_here() is None


def test_a_matrix_is_read_off_the_strides() -> None:
    t = torch.empty(2, 12, 3, 5)
    assert Matrix.of(t) == (24, 15, 2, 12, False)
    assert Matrix.of(t.contiguous(memory_format=torch.channels_last)) == (30, 12, 2, 12, True)
