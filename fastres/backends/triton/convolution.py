"""Convolutions as implicit matrix products, with prologues and epilogues."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.backends.triton.batch_norm import bn_act_backward_apply
from fastres.backends.triton.launch import MAX_REGISTERS, Described, kernel_of, launch, tuned
from fastres.backends.triton.residual import act_backward
from fastres.backends.triton.support import device_of, gate_code, why_not
from fastres.backends.triton.walk import merge_stats, sum_partials
from fastres.primitives import (
    Branch,
    ConvSpec,
    Gate,
    Gated,
    PendingGrad,
    Prologue,
    Request,
    dense,
    register,
)

#: Fewer channels of a group than this leave the matrix units mostly idle: they take 16 at least.
_LEAST_GROUP = 16

#: Programs per multiprocessor that a weight gradient's splits aim at, and the most splits: each
#: leaves a part of the weight's size in float32.
_WEIGHT_PROGRAMS = 4
_MOST_SPLITS = 256


def _why_not(request: Request) -> str | None:
    if (reason := why_not(request)) is not None:
        return reason
    if not request.channels_last:
        return "it takes channels_last tensors"
    conv = request.conv
    if conv is not None and max(conv.dilation) > 1 and max(conv.stride) > 1:
        return "a dilation together with a stride has no kernel"
    if conv is not None and conv.groups > 1 and request.group_width < _LEAST_GROUP:
        return f"groups must have {_LEAST_GROUP} channels or more, got {request.group_width}"
    return None


class _Problem(NamedTuple):
    """The sizes of a convolution, x [N, C, H, W] to y [N, K, P, Q]."""

    images: int
    height: int
    width: int
    out_height: int
    out_width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int]
    conv: ConvSpec

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, conv: ConvSpec) -> _Problem:
        n, c, h, w = x.shape
        k, _, kh, kw = weight.shape
        return cls(n, h, w, *conv.output_size((h, w), (kh, kw)), c, k, (kh, kw), conv)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' numbers."""
        return self[:7]

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        return _geometry(self.kernel, self.conv)

    @property
    def in_pixels(self) -> int:
        return self.images * self.height * self.width

    @property
    def out_pixels(self) -> int:
        return self.images * self.out_height * self.out_width

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.images, self.out_channels, self.out_height, self.out_width


@lru_cache(maxsize=256)
def _geometry(kernel: tuple[int, int], conv: ConvSpec) -> dict[str, int]:
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, conv.stride, conv.padding, conv.dilation
    return {
        "TAPS_H": kh, "TAPS_W": kw, "STRIDE_H": sh, "STRIDE_W": sw, "PAD_H": ph, "PAD_W": pw,
        "DILATION_H": dh, "DILATION_W": dw, "GROUPS": conv.groups,
    }  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's own switch for convolutions; ROCm's have no TF32."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if _allows_tf32() else "ieee"


def _allows_tf32() -> bool:
    """What torch's own convolutions would do, by the newer switch where there is one.

    Reading the older one raises where a user has set the newer.
    """
    choices = [torch.backends.cudnn, getattr(torch.backends.cudnn, "conv", None)]
    found = [getattr(choice, "fp32_precision", "none") for choice in reversed(choices)]
    named = [precision for precision in found if precision != "none"]
    return named[0] == "tf32" if named else bool(torch.backends.cudnn.allow_tf32)


@lru_cache(maxsize=1024)
def _tiles(*problem: int | bool) -> list[Any]:
    tiles: Callable[..., list[Any]] = kernel_of("conv", "tiles")
    return tiles(*problem)


def _choose(
    module: str,
    p: _Problem,
    shape: tuple[int, int, int],
    flags: dict[str, Any],
    run: Callable[[Any], object],
    like: Tensor,
    described: bool = False,
) -> Any:
    """The tile for a product of `shape` (rows, columns, depth).

    `described` adds the same tiles by tensor descriptors: to be measured, never taken unmeasured.
    """
    device = device_of(like)
    # A weight gradient fills the device by splitting its sum, whatever the tile.
    processors = 1 if module == "conv_bwd_weight" else device.processors
    formed = not flags.get("PENDING", False)
    candidates = _tiles(*shape, like.element_size(), processors, device.shared_bytes, formed)
    if described:
        candidates = [*candidates, *(t._replace(descriptors=True) for t in candidates)]
        if device.specialises:
            candidates += [t._replace(specialised=True) for t in candidates if t.descriptors]
    # Not by HAS_STATE: a recomputed output must have the bits of the first one.
    by = [value for name, value in flags.items() if name != "HAS_STATE"]
    sizes = (*p.sizes, *p.kernel, str(p.conv), str(like.dtype), described, *by)
    return tuned(f"{module}_kernel", module, sizes, candidates, run, like.device)


def _weight(weight: Tensor) -> Tensor:
    """[K, C, kh, kw] with its channels innermost, as the kernels read it."""
    return dense(weight, torch.channels_last)


def _empty(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


# ---------------------------------------------------------------- forward


class _Epilogue(NamedTuple):
    """What the forward kernel does after the products."""

    bias: Tensor | None
    stats: Tensor | None = None
    residual: Tensor | None = None
    act: str = "none"
    want_state: bool = False


def _forward(
    x: Tensor, weight: Tensor, conv: ConvSpec, prologue: Prologue | None, epilogue: _Epilogue
) -> tuple[Tensor, Tensor | None]:
    p, weight = _Problem.of(x, weight, conv), _weight(weight)
    flags = {
        "HAS_PROLOGUE": prologue is not None,
        "RELU_X": prologue is not None and prologue.act == "relu",
        "HAS_BIAS": epilogue.bias is not None,
        "HAS_AFFINE": epilogue.stats is not None,
        "HAS_RESIDUAL": epilogue.residual is not None,
        "RELU": epilogue.act == "relu",
        "HAS_STATE": epilogue.want_state,
        "PRECISION": _precision(x.dtype),
    }
    group_out = p.out_channels // conv.groups
    x_stats = None if prologue is None else prologue.stats

    def run(tile: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, tiles = _empty(p.out_shape, x), -(-p.out_pixels // tile.m)
        partials = counts = None
        if epilogue.want_state:
            partials = torch.empty(tiles, 3, p.out_channels, device=x.device)
            counts = torch.empty(tiles, device=x.device)
        if tile.descriptors:
            _launch_described(tile, flags, x, x_stats, weight, y, partials, counts)
            return y, partials, counts
        bias = None if epilogue.bias is None else epilogue.bias.contiguous()
        given = (bias, epilogue.stats, epilogue.residual)
        launch(
            kernel_of("conv_fwd", "conv_fwd_kernel"),
            (tiles * conv.groups * -(-group_out // tile.n),),
            (x, x_stats, weight, *given, y, partials, counts),
            p.sizes,
            {**p.constants, **flags, **tile.constants},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return y, partials, counts

    shape = (p.out_pixels, group_out, p.channels // conv.groups)
    described = _describable(p, x, weight, epilogue)
    y, partials, counts = run(_choose("conv_fwd", p, shape, flags, run, x, described))
    if partials is None or counts is None:
        return y, None
    if p.out_pixels == 0:
        return y, torch.zeros(2, p.out_channels, device=x.device)
    return y, merge_stats(partials, counts)


def _describable(p: _Problem, x: Tensor, weight: Tensor, epilogue: _Epilogue) -> bool:
    """Whether the kernel with tensor descriptors does this, and such tensors can be described."""
    plain = epilogue.bias is None and epilogue.stats is None and p.conv.is_pointwise(p.kernel)
    if not plain or not device_of(x).copy_engine or p.out_pixels == 0:
        return False
    # Rows are multiples of 16 bytes, and so is where they start.
    row = 16 // x.element_size()
    aligned = x.device.type == "meta" or (x.data_ptr() | weight.data_ptr()) % 16 == 0
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
    names = ("HAS_PROLOGUE", "RELU_X", "HAS_STATE", "PRECISION")
    launch(
        kernel_of("conv1x1_fwd", "conv1x1_fwd_kernel"),
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
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        # Warps that are added to load share the registers: a cap would be one they cannot have.
        max_registers=None if tile.specialised else MAX_REGISTERS,
    )  # fmt: skip


def _matrix(t: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last as [pixels, channels]."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


@register("conv_forward", "triton", why_not=_why_not, name="implicit_gemm")
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: ConvSpec,
    *,
    prologue: Prologue | None = None,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = conv(P(x), weight) + bias and, out of the same launch, its statistics."""
    return _forward(x, weight, conv, prologue, _Epilogue(bias, want_state=want_state))


@register("conv_bn_act", "triton", why_not=_why_not, name="implicit_gemm")
def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: ConvSpec,
    stats: Tensor,
    *,
    residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """Inference in one launch: convolution, batch norm, addition and activation."""
    return _forward(x, weight, conv, None, _Epilogue(bias, stats, residual, act))[0]


# ---------------------------------------------------------------- backward


class _Incoming(NamedTuple):
    """grad_y as the backward kernels take it: formed, or with what is pending on it."""

    tensors: tuple[Tensor | None, ...]
    flags: dict[str, Any]
    inverse_count: float

    @classmethod
    def formed(cls, grad_y: Tensor) -> _Incoming:
        flags = {"PENDING": False, "GATE": 0, "HAS_SUMS": False}
        return cls((grad_y, None, None, None, None), flags, 1.0)

    @classmethod
    def pending(cls, grad: PendingGrad) -> _Incoming:
        if grad.gate.kind == "out":
            raise NotImplementedError("gate must be none, mask or affine, got out")
        flags = {"PENDING": True, "GATE": gate_code(grad.gate), "HAS_SUMS": grad.values > 0}
        sums = grad.sums if grad.values else None
        tensors = (grad.grad_out, grad.gate.tensor, grad.branch.y, grad.branch.stats, sums)
        return cls(tensors, flags, 1 / max(grad.values, 1))


def _data(
    incoming: _Incoming,
    weight: Tensor,
    like: Tensor,
    conv: ConvSpec,
    accumulate: Tensor | Gated | None,
    reduce: tuple[Gate, Branch] | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the input and, on demand, the sums of the batch norm below it."""
    p, weight = _Problem.of(like, weight, conv), _weight(weight)
    residual, residual_gate, kind = _residual(accumulate)
    gate, below = reduce or (Gate("none"), Branch(None, None))  # type: ignore[arg-type]
    if gate.kind not in ("none", "affine"):
        raise NotImplementedError(f"the gate below must be none or affine, got {gate.kind}")
    flags = {
        **incoming.flags,
        "RESIDUAL": kind,
        "HAS_BELOW": reduce is not None,
        "BELOW_GATE": gate_code(gate),
        "PRECISION": _precision(like.dtype),
    }
    (sh, sw), group_in = conv.stride, p.channels // conv.groups
    class_pixels = p.images * -(-p.height // sh) * -(-p.width // sw)

    def run(tile: Any) -> tuple[Tensor, Tensor | None]:
        grad_x, tiles = torch.empty_like(like), sh * sw * -(-class_pixels // tile.m)
        partials = None
        if reduce is not None:
            partials = torch.empty(tiles, 3, p.channels, device=like.device)
        launch(
            kernel_of("conv_bwd_data", "conv_bwd_data_kernel"),
            (tiles * conv.groups * -(-group_in // tile.n),),
            (*incoming.tensors, weight, residual, residual_gate, *below, grad_x, partials),
            (*p.sizes, incoming.inverse_count),
            {**p.constants, **flags, **tile.constants},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return grad_x, partials

    if class_pixels == 0:
        return torch.empty_like(like), like.new_zeros(3, p.channels, dtype=torch.float32)
    shape = (class_pixels, group_in, p.out_channels // conv.groups)
    grad_x, partials = run(_choose("conv_bwd_data", p, shape, flags, run, like))
    return grad_x, None if partials is None else sum_partials(partials)


def _residual(accumulate: Tensor | Gated | None) -> tuple[Tensor | None, Tensor | None, int]:
    """(gradient, mask, the kernel's code) of what a data gradient is added to."""
    if accumulate is None:
        return None, None, 0
    if isinstance(accumulate, Tensor):
        return accumulate, None, 1
    grad_out, gate = accumulate
    if gate.kind == "mask":
        return grad_out, gate.tensor, 2
    if gate.kind == "none":
        return grad_out, None, 1
    return act_backward(grad_out, gate), None, 1


def _weight_gradient(
    incoming: _Incoming, x: Tensor, weight: Tensor, conv: ConvSpec, prologue: Prologue | None
) -> Tensor:
    p = _Problem.of(x, weight, conv)
    flags = {
        **incoming.flags,
        "HAS_PROLOGUE": prologue is not None,
        "RELU_X": prologue is not None and prologue.act == "relu",
        "PRECISION": _precision(x.dtype),
    }
    x_stats = None if prologue is None else prologue.stats
    group_in, group_out = p.channels // conv.groups, p.out_channels // conv.groups
    kh, kw = p.kernel

    def run(tile: Any) -> Tensor:
        programs = kh * kw * conv.groups * -(-group_out // tile.m) * -(-group_in // tile.n)
        steps, splits = _splits(p.out_pixels, tile.k, programs, device_of(x).processors)
        parts = torch.empty(splits, p.out_channels, kh, kw, group_in, device=x.device)
        launch(
            kernel_of("conv_bwd_weight", "conv_bwd_weight_kernel"),
            (programs * splits,),
            (*incoming.tensors, x, x_stats, parts),
            (*p.sizes, incoming.inverse_count, steps),
            {**p.constants, **flags, **tile.constants},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return parts

    if p.out_pixels == 0:
        return torch.zeros_like(weight)
    shape = (group_out, group_in, p.out_pixels)
    parts = run(_choose("conv_bwd_weight", p, shape, flags, run, x))
    return sum_partials(parts, weight.dtype).permute(0, 3, 1, 2)


def _splits(pixels: int, block: int, programs: int, processors: int) -> tuple[int, int]:
    """(steps of a split, splits) of the sum over pixels."""
    blocks = -(-pixels // block)
    wanted = max(1, min(_MOST_SPLITS, blocks, _WEIGHT_PROGRAMS * processors // programs))
    steps = -(-blocks // wanted)
    return steps, -(-blocks // steps)


@register("conv_backward_data", "triton", why_not=_why_not, name="implicit_gemm")
def conv_backward_data(
    grad_y: Tensor,
    weight: Tensor,
    like: Tensor,
    conv: ConvSpec,
    *,
    accumulate: Tensor | None = None,
) -> Tensor:
    """Gradient of the input, added to `accumulate` in the same launch."""
    return _data(_Incoming.formed(grad_y), weight, like, conv, accumulate, None)[0]


@register("conv_backward_weight", "triton", why_not=_why_not, name="implicit_gemm")
def conv_backward_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: ConvSpec,
    *,
    prologue: Prologue | None = None,
) -> Tensor:
    """Gradient of the weight; P(x) is formed on the way in."""
    return _weight_gradient(_Incoming.formed(grad_y), x, weight, conv, prologue)


def _unit_backward(
    incoming: _Incoming,
    x: Tensor,
    weight: Tensor,
    conv: ConvSpec,
    *,
    prologue: Prologue | None,
    want_x: bool,
    want_weight: bool,
    accumulate: Tensor | Gated | None,
    reduce: tuple[Gate, Branch] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_x = grad_weight = sums = None
    if want_weight:
        grad_weight = _weight_gradient(incoming, x, weight, conv, prologue)
    if want_x:
        grad_x, sums = _data(incoming, weight, x, conv, accumulate, reduce)
    return grad_x, grad_weight, sums


def _forms_in_prologue(request: Request) -> str | None:
    if "grad_formed" in request.features:
        return "it forms grad_y in its prologues"
    return _why_not(request)


@register("conv_backward", "triton", why_not=_forms_in_prologue, name="grad_prologue")
def conv_backward_pending(
    grad: PendingGrad, x: Tensor, weight: Tensor, conv: ConvSpec, **wanted: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward of a unit at level c: grad_y is formed in both prologues, and never stored.

    `wanted` holds the keywords of the primitive: prologue, want_x, want_weight, accumulate, reduce.
    """
    return _unit_backward(_Incoming.pending(grad), x, weight, conv, **wanted)


@register("conv_backward", "triton", why_not=_why_not, name="grad_formed")
def conv_backward_formed(
    grad: PendingGrad, x: Tensor, weight: Tensor, conv: ConvSpec, **wanted: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward of a unit at level c': one pass forms grad_y, which both products then read.

    `wanted` holds the keywords of the primitive, as for `conv_backward_pending`.
    """
    (grad_y,), _ = bn_act_backward_apply(
        grad.grad_out, grad.gate, (grad.branch,), grad.sums, grad.values, want_grads=(True,)
    )
    assert grad_y is not None
    return _unit_backward(_Incoming.formed(grad_y), x, weight, conv, **wanted)
