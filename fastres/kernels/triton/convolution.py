"""Convolutions forward, as implicit matrix products with a prologue and an epilogue."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastres.kernels.common import floats, precision_of, zeros
from fastres.kernels.registry import register
from fastres.kernels.tape import taping
from fastres.kernels.triton.activation import functions_of, prologue_flags
from fastres.kernels.triton.batch_norm import merge_stats
from fastres.kernels.triton.launch import MAX_REGISTERS, Described, kernels, launch
from fastres.kernels.triton.products import (
    Problem,
    channels_innermost,
    choose_tile,
    empty,
    why_not_convolved,
)
from fastres.kernels.triton.support import device_of
from fastres.kernels.types import Conv, Prologue


class _Epilogue(NamedTuple):
    """What the forward kernel does after the products."""

    bias: Tensor | None
    stats: Tensor | None = None
    residual: Tensor | None = None
    act: str = "none"
    want_state: bool = False


def _forward(
    x: Tensor, weight: Tensor, conv: Conv, prologue: Prologue | None, epilogue: _Epilogue
) -> tuple[Tensor, Tensor | None]:
    kernel = kernels().conv_fwd.conv_fwd_kernel
    p, weight = Problem.of(x, weight, conv), channels_innermost(weight)
    x_stats = None if prologue is None else prologue.stats
    flags = {
        **prologue_flags(prologue),
        "HAS_BIAS": epilogue.bias is not None,
        "HAS_AFFINE": epilogue.stats is not None,
        "HAS_RESIDUAL": epilogue.residual is not None,
        "ACT": functions_of(epilogue.act).value if epilogue.stats is not None else None,
        "HAS_STATE": epilogue.want_state,
        "PRECISION": precision_of(x.dtype),
    }
    group_out = p.out_channels // conv.groups

    def run(tile: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, tiles = empty(p.out_shape, x), -(-p.out_pixels // tile.m)
        partials = counts = None
        if epilogue.want_state:
            partials = floats(tiles, 3, p.out_channels, device=x.device)
            counts = floats(tiles, device=x.device)
        if tile.descriptors:
            _launch_described(tile, flags, x, x_stats, weight, y, partials, counts)
            return y, partials, counts
        bias = None if epilogue.bias is None else epilogue.bias.contiguous()
        tail = p.channels // conv.groups % tile.k > 0
        after = (bias, epilogue.stats, epilogue.residual)
        launch(
            kernel,
            (tiles * conv.groups * -(-group_out // tile.n),),
            (x, x_stats, weight, *after, y, partials, counts),
            p.sizes,
            {**p.constants, **flags, "WIDE": p.wide, "TAIL_K": tail, **tile.constants},
            **tile.options,
        )
        return y, partials, counts

    shape = (p.out_pixels, group_out, p.channels // conv.groups)
    described = _describable(p, x, weight, epilogue)
    y, partials, counts = run(choose_tile(kernel, p, shape, flags, run, x, described))
    if partials is None or counts is None:
        return y, None
    if p.out_pixels == 0:
        return y, zeros(2, p.out_channels, device=x.device)
    return y, merge_stats(partials, counts)


def _describable(p: Problem, x: Tensor, weight: Tensor, epilogue: _Epilogue) -> bool:
    """Whether the kernel with tensor descriptors does this, and such tensors can be described."""
    plain = epilogue.bias is None and epilogue.stats is None and p.conv.is_pointwise(p.kernel)
    if not plain or not device_of(x).copy_engine or p.out_pixels == 0:
        return False
    # Rows are multiples of 16 bytes, and so is where they start.
    row = 16 // x.element_size()
    aligned = x.device.type == "meta" or (x.data_ptr() | weight.data_ptr()) % 16 == 0
    if (tape := taping()) is not None:
        tape.holds((x, weight) if aligned else ())
    return p.channels % row == 0 and p.out_channels % row == 0 and aligned


def _launch_described(
    tile: Any,
    flags: dict[str, Any],
    x: Tensor,
    x_stats: Tensor | None,
    weight: Tensor,
    y: Tensor,
    partials: Tensor | None,
    counts: Tensor | None,
) -> None:
    """The 1x1 convolution on a persistent grid: as many programs as the device holds at a time."""
    (k, c), pixels, device = weight.shape[:2], y.numel() // y.shape[1], device_of(x)
    programs = -(-pixels // tile.m) * -(-k // tile.n)
    at_a_time = max(1, device.shared_bytes // tile.shared_bytes(x.element_size()))
    names = ("HAS_PROLOGUE", "ACT_X", "HAS_STATE", "PRECISION")
    launch(
        kernels().conv1x1_fwd.conv1x1_fwd_kernel,
        (min(programs, device.processors * min(2, at_a_time)),),
        (
            Described(_matrix(x), (tile.m, tile.k)), x_stats,
            Described(_matrix(weight), (tile.n, tile.k)),
            Described(_matrix(y), (tile.m, tile.n)), partials, counts,
        ),
        (pixels, c, k),
        {
            **{name: flags[name] for name in names},
            "WARP_SPECIALIZE": tile.specialised,
            **tile.constants,
        },
        **tile.options,
        # Warps that are added to load share the registers: a cap would be one they cannot have.
        max_registers=None if tile.specialised else MAX_REGISTERS,
    )  # fmt: skip


def _matrix(t: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last as [pixels, channels]."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


@register("conv_forward", "triton", why_not=why_not_convolved, name="implicit_gemm")
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    *,
    prologue: Prologue | None = None,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = conv(P(x), weight) + bias and, out of the same launch, its statistics."""
    return _forward(x, weight, conv, prologue, _Epilogue(bias, want_state=want_state))


@register("conv_bn_act", "triton", why_not=why_not_convolved, name="implicit_gemm")
def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    stats: Tensor,
    *,
    residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """Inference in one launch: convolution, batch norm, addition and activation."""
    return _forward(x, weight, conv, None, _Epilogue(bias, stats, residual, act))[0]
