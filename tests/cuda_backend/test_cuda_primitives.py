"""Every implementation of the cuda backend on the table of cases, in every way to launch it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from backend_checks import accepts, check_cases, check_repeats, needs_gpu
from torch import Tensor

from fastres.kernels import PRIMITIVES, Branch, Gate, Implementation, implementations
from fastres.kernels.cuda import batch_norm, channel_block, tiling
from fastres.kernels.cuda.channel_block import PASSES, variants
from fastres.testing import CASES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_poison")]

ENTRIES = list(implementations(backend="cuda"))
#: In portions, so that several processes share the work; layouts alternate in the table.
PORTIONS = [CASES[i::5] for i in range(5)]
#: Vectors and single elements, several blocks, tails of rows, both layouts, all dtypes.
VARIED = [
    case
    for case in CASES
    if case.dtype != torch.float64 and math.prod(case.shape) > 500 and case.values == "normal"
]
NORMS = [entry for entry in ENTRIES if entry.primitive in ("bn_act_forward", "bn_act_backward")]
TILED = [
    e
    for e in ENTRIES
    if not e.primitive.startswith(("conv_", "finalize", "update")) and e not in NORMS
]


@pytest.mark.grid(4)
@pytest.mark.parametrize("cases", PORTIONS, ids=lambda cases: f"from {cases[0]}")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e}-{e.primitive}")
def test_implementation_is_right_on_every_case(
    entry: Implementation, cases: list[Case], device: str
) -> None:
    # A portion may be declined as a whole, not the table.
    ran = check_cases(entry, cases, device)
    assert ran or accepts(entry, CASES, device), "everything was declined"


def test_every_primitive_around_the_convolutions_has_one() -> None:
    others = {p for p in PRIMITIVES if not p.startswith("conv_") and "pool" not in p}
    own = {"conv_backward_data", "conv_bn_act"}
    assert {entry.primitive for entry in ENTRIES} == others | own


# ---------------------------------------------------------------- every way to launch


#: (threads, width, rows of a chunk): blocks of each size, narrow and wide, many chunks and one.
SHAPES_OF_BLOCKS = [(64, 8, 3), (64, 64, 1), (128, 2, 40), (256, 1, 300), (256, 256, 10**6)]
#: The same with a pipeline through shared memory: fewer rows than stages, and more.
SHAPES_OF_BLOCKS += [(64, 1, 40, 4), (64, 64, 3, 4), (256, 4, 10**6, 4)]


@pytest.mark.grid(5)
@pytest.mark.parametrize("shape", SHAPES_OF_BLOCKS, ids=str)
@pytest.mark.parametrize("entry", TILED, ids=lambda e: e.primitive)
def test_blocks_of_any_shape(
    entry: Implementation, shape: tuple[int, ...], device: str, monkeypatch
) -> None:
    forced = tiling.Tiling(*shape)
    monkeypatch.setattr(batch_norm, "choose", lambda *args, **kwargs: forced)
    assert check_cases(entry, VARIED[:: 1 if device == "cuda" else 3], device) > 0


#: There is no pipeline for a mask whose words are shared by rows: 40 channels; else 64.
PIPELINES = [(64, "none"), (64, "affine"), (64, "mask"), (64, "out"), (40, "mask"), (40, "out")]


@pytest.mark.grid(5)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("channels", "kind"), PIPELINES)
def test_pipelines_change_no_bit(
    channels: int, kind: str, dtype: torch.dtype, branches: int, device: str, monkeypatch
) -> None:
    """Whether a thread has no, few or many rows, with and without what may be written."""
    if (kind, branches) == ("affine", 2):
        pytest.skip("two branches have no affine gate")
    grad, *ys = (
        torch.randn(3, channels, 5, 7, device=device).to(dtype, memory_format=torch.channels_last)
        for _ in range(3)
    )
    stats = [batch_norm.batch_stats(y, None, None, 1e-5) for y in ys]
    out, mask = batch_norm.scale_shift_act(ys[0], stats[0], act="relu", want_mask=True)
    gate = Gate(kind, {"mask": mask, "out": out}.get(kind))
    pairs = [Branch(y, s) for y, s in zip(ys, stats, strict=True)][:branches]

    def run(way: tiling.Tiling) -> list[Tensor | None]:
        monkeypatch.setattr(batch_norm, "choose", lambda *args, **kwargs: way)
        sums = batch_norm.bn_act_backward_reduce(grad, gate, pairs)
        found: list[Tensor | None] = [*sums[: 1 + branches]]
        for count, residual in [(105, False), (105, True), (0, True)]:
            wanted = {"want_grads": [True] * branches, "want_residual": residual}
            grads, g = batch_norm.bn_act_backward_apply(grad, gate, pairs, sums, count, **wanted)
            found += [*grads, g]
        return found

    for way in [(256, 8, 105), (256, 2, 17), (64, 4, 50), (128, 1, 300)]:
        plain, staged = (run(tiling.Tiling(*way, n)) for n in (0, tiling.PIPELINE_STAGES))
        assert all(a is b is None or a.equal(b) for a, b in zip(plain, staged, strict=True))


@pytest.mark.parametrize("device_size", [1, 7, 132])
@pytest.mark.parametrize("make", [tiling.map_tilings, tiling.sum_tilings], ids=["map", "sum"])
def test_candidates_are_ones_that_the_kernels_take(make: Callable, device_size: int) -> None:
    for shape in [
        (256, 64, 3136, 0, 1),
        (32, 2048, 49, 0, 1),
        (8, 3, 50176, 1, 0),
        (1, 1, 1, 1, 2),
    ]:
        found = make(tiling.Shape(*shape), device_size)
        assert len(set(found)) == len(found) >= 1
        for one in found:
            assert one.threads in (64, 128, 256)
            assert one.width & (one.width - 1) == 0
            assert 1 <= one.width <= one.threads
            assert one.chunk_rows >= 1
        staged = tiling.with_pipelines(tiling.Shape(*shape), found)[len(found) :]
        assert {one.stages for one in staged} == ({4} if shape[3] == 0 and shape[4] else set())


def _channel_blocks(direction: str, t: Tensor, second: bool) -> list[tiling.Tiling]:
    """Every width, with all the thread blocks there may be and with one, where that is possible."""
    shape = tiling.Shape.of(t)
    blocks = channel_block._resident(direction, shape.dtype, second, t.device)
    return [way for n in (blocks, 1) for way in tiling.channel_block_tilings(shape, n, 1 << 40)]


@pytest.mark.grid(5)
@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("entry", NORMS, ids=lambda e: e.primitive)
def test_channel_blocks_are_right(
    entry: Implementation, position: int, device: str, monkeypatch
) -> None:
    ran = []

    def forced(direction: str, tensors: list, second: bool) -> tuple[channel_block.Variant, ...]:
        found = _channel_blocks(direction, tensors[0], second)
        if variants(direction, tensors, second) == (PASSES,):
            return (PASSES,)
        ran.append(direction)
        return (found[position % len(found)],)

    monkeypatch.setattr(channel_block, "variants", forced)
    cases = [case for case in CASES if case.dtype != torch.float64 and case.channels_last]
    assert check_cases(entry, cases[position::6] if device == "cpu" else cases, device) > 0
    assert ran, "no case was run in channel blocks"


def test_channel_blocks_give_what_passes_give(device: str, monkeypatch) -> None:
    """The same partial sums joined in another order: equal but for the last bits."""
    y = torch.randn(4, 40, 9, 9, device=device).to(memory_format=torch.channels_last)
    one = channel_block.bn_act_forward(y, None, None, 1e-5, act="relu", want_mask=True)
    for way in _channel_blocks("forward", y, False):
        monkeypatch.setattr(channel_block, "variants", lambda *_, way=way: (way,))
        found = channel_block.bn_act_forward(y, None, None, 1e-5, act="relu", want_mask=True)
        torch.testing.assert_close(found.stats, one.stats, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.out, one.out, rtol=1e-6, atol=1e-6)


def test_large_channel_blocks_give_what_passes_give(device: str) -> None:
    """As many blocks as the device holds, over thousands of rows each."""
    needs_gpu(device)
    y = torch.randn(64, 256, 56, 56, device=device, dtype=torch.bfloat16)
    y = y.to(memory_format=torch.channels_last)

    def forward(variant: channel_block.Variant) -> channel_block.Forward:
        with mock.patch.object(channel_block, "variants", return_value=(variant,)):
            return channel_block.bn_act_forward(y, None, None, 1e-5, act="relu", want_mask=True)

    one = forward(PASSES)
    gate = Gate("mask", one.mask, "relu")
    branches, count = (Branch(y, one.stats),), y.numel() // 256

    def backward(variant: channel_block.Variant) -> channel_block.Backward:
        with mock.patch.object(channel_block, "variants", return_value=(variant,)):
            return channel_block.bn_act_backward(y.neg(), gate, branches, count, want_residual=True)

    back = backward(PASSES)
    close = partial(torch.testing.assert_close, rtol=2**-7, atol=2**-7)  # a bit of bfloat16
    for way in _channel_blocks("forward", y, False):
        found = forward(way)
        torch.testing.assert_close(found.stats, one.stats, rtol=1e-5, atol=1e-6)
        close(found.out, one.out)
    for way in _channel_blocks("backward", y, False):
        found = backward(way)
        torch.testing.assert_close(found.sums[:2], back.sums[:2], rtol=1e-4, atol=1e-1)
        close(found.grads[0], back.grads[0])
        assert torch.equal(found.residual, back.residual)


def test_channel_blocks_fit_the_cache() -> None:
    """ResNet-50's at batch 256 in 16 bits, and one that does not fit however narrow it is."""
    shape = tiling.Shape(256, 1024, 196, 0, 1)
    assert [way.width for way in tiling.channel_block_tilings(shape, 264, (50 << 20) // 2)] == [
        32,
        16,
        8,
        4,
        2,
    ]
    shape = tiling.Shape(256, 256, 3136, 0, 1)
    assert [way.width for way in tiling.channel_block_tilings(shape, 264, (50 << 20) // 2)] == [
        4,
        2,
    ]
    assert tiling.channel_block_tilings(shape, 264, (50 << 20) // 6) == ()
    for way in tiling.channel_block_tilings(tiling.Shape(8, 64, 49, 0, 1), 4, 1 << 30):
        assert -(-8 * 49 // way.chunk_rows) <= 4


def test_no_channel_blocks_where_something_is_misaligned(device: str) -> None:
    """A choice that was measured on aligned tensors must not meet others."""
    y = torch.randn(2, 16, 4, 4, device=device).to(memory_format=torch.channels_last)
    assert len(variants("forward", (y, None), False)) > 1
    assert variants("forward", (y, _offset(y, 1)[0]), False) == (PASSES,)
    one = channel_block.bn_act_forward(y, None, None, 1e-5, residual=y, act="relu")
    moved = channel_block.bn_act_forward(y, None, None, 1e-5, residual=_offset(y, 1)[0], act="relu")
    assert torch.equal(one.out, moved.out)


# ---------------------------------------------------------------- memory


def _offset(t: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    """A copy of `t` that begins so far into a buffer full of sentinels, and that buffer."""
    size = t.untyped_storage().nbytes() // t.element_size()
    buffer = torch.full((size + 2 * 64,), 77.0, dtype=t.dtype, device=t.device)
    view = buffer.as_strided(t.shape, t.stride(), 64 + elements)
    return view.copy_(t), buffer


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [0, 1, 3, 4])
def test_views_that_begin_anywhere(
    elements: int, dtype: torch.dtype, channels_last: bool, device: str
) -> None:
    """Vectors are read where addresses allow it, single elements else; the bits are the same."""
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    y, grad, residual = (
        torch.randn(3, 16, 4, 6, device=device).to(dtype, memory_format=fmt) for _ in range(3)
    )
    stats = batch_norm.finalize_stats(
        batch_norm.channel_stats(y), 72, None, None, None, 1e-5, acc=torch.float32
    )
    expected, _ = batch_norm.scale_shift_act(y, stats, residual=residual, act="relu")
    (moved_y, _), (moved_r, _) = _offset(y, elements), _offset(residual, elements)
    out, buffer = _offset(torch.zeros_like(y), elements)
    batch_norm.scale_shift_act(moved_y, stats, residual=moved_r, act="relu", out=out)
    assert torch.equal(out, expected)
    _assert_untouched(buffer, elements, y.numel())
    gate, branch = Gate("out", expected), Branch(y, stats)
    sums = batch_norm.bn_act_backward_reduce(grad, gate, (branch,))
    more = {"want_grads": (True,)}
    (whole,), _ = batch_norm.bn_act_backward_apply(grad, gate, (branch,), sums, 72, **more)
    moved_grad, buffer = _offset(grad, elements)
    moved = Branch(moved_y, stats)
    batch_norm.bn_act_backward_apply(
        moved_grad, Gate("out", _offset(expected, elements)[0]), (moved,), sums, 72,
        out=moved_grad, **more,
    )  # fmt: skip
    assert torch.equal(moved_grad, whole)
    _assert_untouched(buffer, elements, y.numel())


def _assert_untouched(buffer: Tensor, elements: int, size: int) -> None:
    begin = 64 + elements
    assert (buffer[:begin] == 77).all()
    assert (buffer[begin + size :] == 77).all()


@pytest.mark.parametrize("primitive", sorted({e.primitive for e in ENTRIES}))
def test_two_runs_give_the_same_bits(primitive: str, device: str) -> None:
    """250 repeats on a GPU, where a race would show; the emulation shuffles blocks and threads."""
    own = (entry for entry in ENTRIES if entry.primitive == primitive)
    check_repeats(own, device, 250 if device == "cuda" else 4)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_what_the_kernels_write_is_float32_whatever_the_default(
    default: torch.dtype, device: str
) -> None:
    y = torch.randn(2, 16, 5, 5, device=device)
    try:
        torch.set_default_dtype(default)
        stats, out, _ = channel_block.bn_act_forward(y, None, None, 1e-5, act="relu")
        state = batch_norm.channel_stats(y)
        sums, _, _ = channel_block.bn_act_backward(y, Gate("out", out), (Branch(y, stats),), 50)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in (stats, state, sums)} == {torch.float32}
    torch.testing.assert_close(stats[0], y.mean((0, 2, 3)))
    torch.testing.assert_close(sums[0], torch.where(out > 0, y, 0).sum((0, 2, 3)))


# ---------------------------------------------------------------- what is refused


def test_two_branches_have_no_affine_gate(device: str) -> None:
    y = torch.randn(2, 8, 3, 3, device=device)
    branch = Branch(y, torch.ones(5, 8, device=device))
    with pytest.raises(ValueError, match="gate must be none, mask or out where there are two"):
        batch_norm.bn_act_backward_reduce(y, Gate("affine"), (branch, branch))


def test_a_wrong_tiling_is_an_error(device: str, monkeypatch) -> None:
    y = torch.randn(2, 8, 3, 3, device=device)
    for wrong, message in [
        ((96, 8, 4), "threads must be 64, 128 or 256, got 96"),
        ((64, 3, 4), "width must be a power of two, got 3"),
        ((64, 8, 4, 3), "stages must be 0 or 4, got 3"),
    ]:
        forced = tiling.Tiling(*wrong)
        monkeypatch.setattr(batch_norm, "choose", lambda *a, _forced=forced, **k: _forced)
        with pytest.raises(ValueError, match=message):
            batch_norm.channel_stats(y)


def test_empty_activations_launch_nothing(device: str) -> None:
    y = torch.empty(0, 8, 3, 3, device=device)
    assert batch_norm.channel_stats(y).equal(torch.zeros(2, 8, device=device))
    stats = torch.ones(5, 8, device=device)
    out, mask = batch_norm.scale_shift_act(y, stats, act="relu", want_mask=True)
    assert out.shape == y.shape
    assert mask is not None and mask.numel() == 0
