"""Convolutions of our own, on the kernels of `csrc/cpu`: channels_last, without groups.

float32, and bfloat16 with sums in float32; then the weight and a bias are bfloat16 too.

What stands in front of a convolution is formed panel by panel, and what stands behind it is done to
a panel before that leaves the cache: no pass over memory is left but those of the convolution.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from fastres.kernels import aten
from fastres.kernels.common import ACT_CODES, DTYPE_CODES, address, gate_act_code, gate_code
from fastres.kernels.cpu.module import empty, module
from fastres.kernels.cpu.pointwise import bn_act_backward_reduce, channel_stats, coefficients
from fastres.kernels.cpu.program import computing, note_packed
from fastres.kernels.registry import Request, register
from fastres.kernels.types import Branch, Conv, Gate, Gated, PendingGrad, Prologue

_kernels = module()

#: No gate: how the kernels are told of one, and of a gradient that was formed already.
_OPEN = (0, 0, 0)


def _has_amx() -> bool:
    """Whether oneDNN multiplies bfloat16 by AMX, several times as fast as AVX512-BF16 can be."""
    return bool(torch.cpu._is_amx_tile_supported())


def _why_not(request: Request) -> str | None:
    if request.device != "cpu" or not request.channels_last:
        return "it takes channels_last tensors on the CPU"
    if request.dtype not in (torch.float32, torch.bfloat16):
        return f"it convolves float32 and bfloat16, got {request.dtype}"
    if request.dtype == torch.bfloat16 and _has_amx():
        return "oneDNN convolves bfloat16 by AMX here"
    if request.act not in ACT_CODES:
        return f"activation {request.act!r} has no CPU kernel"
    if request.conv is not None and request.conv.groups != 1:
        return f"it convolves without groups, got {request.conv.groups}"
    return None


class _Job(NamedTuple):
    """A convolution as the kernels are told of it."""

    shape: list[int]
    output: tuple[int, int, int, int]
    threads: int

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, conv: Conv) -> _Job:
        n, c, h, w = x.shape
        k, _, kh, kw = weight.shape
        stride, padding, dilation, _ = conv
        output = (n, k, *conv.output_size((h, w), (kh, kw)))
        shape = [n, h, w, c, k, kh, kw, *stride, *padding, *dilation, DTYPE_CODES[x.dtype]]
        return cls(shape, output, torch.get_num_threads())


def _is_empty(x: Tensor, weight: Tensor) -> bool:
    """Whether there is nothing to compute: then torch says what comes of it."""
    return x.numel() == 0 or weight.numel() == 0


# ---------------------------------------------------------------- weights


def _code(weight: Tensor) -> tuple[int, tuple[int, ...]]:
    return weight.data_ptr(), weight.stride()


class _Packed(NamedTuple):
    """A weight in the order in which the kernels read it, or None: they pack it as they go then."""

    weight: Tensor | None
    winograd: bool

    @property
    def address(self) -> int:
        return address(self.weight)


def _saved(job: _Job, transposed: bool) -> tuple[int, int]:
    """Multiplications per weight that Winograd's F(2x2, 3x3) saves, and how many there are else.

    Squares of two by two pixels take 16 instead of 36, also where they reach beyond an odd edge.
    """
    n, h, w, c, k, *geometry = job.shape
    fits = geometry[:4] == [3, 3, 1, 1] and geometry[6:] == [1, 1, DTYPE_CODES[torch.float32]]
    if not fits or min(c, k) < _LEAST_CHANNELS:
        return 0, 1
    h, w = (h, w) if transposed else job.output[2:]
    return n * (9 * h * w - 16 * (-(-h // 2) * -(-w // 2))), n * 9 * h * w


#: Where Winograd's form was measured to be faster by 1.15 or more: what is transformed is paid for
#: by channels, and what is saved must be more than what edges leave of it. The weight is larger in
#: that form: it must save something on its way from memory, and more where it is transformed for
#: one use.
_LEAST_CHANNELS, _LEAST_PART_SAVED = 32, 0.3
_LEAST_SAVED, _LEAST_SAVED_ONCE = 250, 600


def _is_winograd(job: _Job, transposed: bool = False, once: bool = False) -> bool:
    """Whether Winograd's form is taken, with a weight that is kept, or packed for this use."""
    saved, of = _saved(job, transposed)
    return (
        saved >= (_LEAST_SAVED_ONCE if once else _LEAST_SAVED) and saved >= _LEAST_PART_SAVED * of
    )


#: The weight's gradient takes squares where there are so many to sum up that their larger errors do
#: not show, and where its sums at all points are no larger than this: they are read and written
#: with each panel.
_LEAST_SQUARES, _LARGEST_RESULT = 384, 16 << 16


def _is_winograd_gradient(job: _Job) -> bool:
    """Whether the weight's gradient is summed up over squares."""
    saved, of = _saved(job, transposed=False)
    squares, points = (of - saved) // 16, 16 * job.shape[3] * job.shape[4]
    enough = squares >= _LEAST_SQUARES and points <= _LARGEST_RESULT
    return enough and saved >= _LEAST_PART_SAVED * of


def _pack(weight: Tensor, job: _Job, transposed: bool = False, winograd: bool = False) -> Tensor:
    """The weight in the order in which the kernels read it; transposed for the data gradient."""
    # Steps of four bytes: a float, or two neighbouring bfloat16.
    size = _kernels.winograd_size if winograd else _kernels.packed_size
    packed = empty((1, 1, 1, size(job.shape, transposed)), torch.float32, channels_last=False)
    _kernels.pack_weight(
        _code(weight), transposed, packed.data_ptr(), job.shape, job.threads, winograd
    )
    return packed


def _packed_for_now(weight: Tensor, job: _Job, transposed: bool = False) -> _Packed:
    """The same for one use; of few pixels, each block is packed where it is used."""
    if winograd := _is_winograd(job, transposed, once=True):
        return _Packed(_pack(weight, job, transposed, winograd), winograd)
    ahead = _kernels.packs_ahead(job.shape, transposed)
    return _Packed(_pack(weight, job, transposed) if ahead else None, winograd)


class _Kept(NamedTuple):
    """A packed weight, and what it was packed from."""

    owner: ref[Tensor]
    state: tuple[int | str, ...]
    packed: _Packed


#: By the weight's id, and whether it is in Winograd's form.
_kept: dict[tuple[int, bool], _Kept] = {}


def _packed_once(weight: Tensor, job: _Job) -> _Packed:
    """The packed weight, kept while the weight stands: for inference.

    It is packed anew where the version counter moved, the memory or the instruction set is another,
    or one of the samples changed that are taken of each output channel: a change through `.data`
    moves no counter. Autocast casts a weight anew at each call: what is no parameter, in bfloat16,
    is packed for one use.
    """
    winograd = _is_winograd(job)
    if weight.is_inference():
        return _Packed(_pack(weight, job, winograd=winograd), winograd)
    if weight.dtype == torch.bfloat16 and not isinstance(weight, torch.nn.Parameter):
        return _packed_for_now(weight, job)
    dtype = DTYPE_CODES[weight.dtype]
    samples = _kernels.sample_weight(weight.data_ptr(), weight.shape, weight.stride(), dtype)
    state = (
        weight._version, weight.data_ptr(), dtype, samples, *weight.stride(), _kernels.isa(),
    )  # fmt: skip
    key = id(weight), winograd
    kept = _kept.get(key)
    if kept is None or kept.owner() is not weight or kept.state != state:
        owner = ref(weight, lambda _: _kept.pop(key, None))
        with computing():
            packed = _Packed(_pack(weight, job, winograd=winograd), winograd)
        kept = _kept[key] = _Kept(owner, state, packed)
    assert kept.packed.weight is not None
    note_packed(weight, kept.packed.weight, samples)
    return kept.packed


# ---------------------------------------------------------------- forward


@register("conv_forward", "cpu", why_not=_why_not, name="native")
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    *,
    prologue: Prologue | None = None,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = conv(P(x), weight) + bias, and its statistics as float64 [2, K]."""
    if _is_empty(x, weight):
        y, _ = aten.conv_forward(x, weight, bias, conv)
        return y, channel_stats(y) if want_state else None
    job = _Job.of(x, weight, conv)
    y = empty(job.output, x.dtype, channels_last=True)
    state = torch.empty(2, y.shape[1], dtype=torch.float64) if want_state else None
    # The kernels read a bias with a stride of 1, whatever its own is.
    bias = None if bias is None else bias.contiguous()
    packed = _packed_for_now(weight, job)
    _kernels.conv_forward(
        *_input(x, prologue), _code(weight), packed.address, address(bias), y.data_ptr(),
        address(state),
        0, 0, 0, 0, job.shape, job.threads, packed.winograd,
    )  # fmt: skip
    return y, state


def _input(x: Tensor, prologue: Prologue | None) -> tuple[int, int, int, int]:
    """x, scale, shift and activation of what is convolved."""
    if prologue is None:
        return x.data_ptr(), 0, 0, 0
    return x.data_ptr(), *coefficients(prologue.stats), ACT_CODES[prologue.act]


@register("conv_bn_act", "cpu", why_not=_why_not, name="native")
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
    """Inference: act(scale * (conv(x, weight) + bias) + shift [+ residual])."""
    if _is_empty(x, weight):
        return aten.conv_bn_act(x, weight, bias, conv, stats, residual=residual, act=act)
    job = _Job.of(x, weight, conv)
    y = empty(job.output, x.dtype, channels_last=True)
    bias = None if bias is None else bias.contiguous()
    packed = _packed_once(weight, job)
    _kernels.conv_forward(
        x.data_ptr(), 0, 0, 0, _code(weight), packed.address, address(bias), y.data_ptr(), 0,
        *coefficients(stats), address(residual), ACT_CODES[act], job.shape, job.threads,
        packed.winograd,
    )  # fmt: skip
    return y


# ---------------------------------------------------------------- backward


@register("conv_backward", "cpu", why_not=_why_not, name="native")
def conv_backward(
    grad: PendingGrad,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    *,
    prologue: Prologue | None,
    want_x: bool,
    want_weight: bool,
    accumulate: Tensor | Gated | None,
    reduce: tuple[Gate, Branch] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward of a whole unit: grad_y is formed in panels, and never stored.

    Arguments and results as `fastres.kernels.cpu.convolution.conv_backward`.
    """
    if _is_empty(x, weight):
        return _empty_backward(grad, x, weight, conv, reduce)
    job = _Job.of(x, weight, conv)
    code = _gradient(grad)
    grad_x = grad_weight = sums = None
    if want_x:
        grad_x, sums = _data_gradient(code, x, weight, job, accumulate, reduce)
    if want_weight:
        grad_weight = torch.empty(
            weight.shape, dtype=weight.dtype, memory_format=torch.channels_last
        )
        _kernels.conv_backward_weight(
            code, *_input(x, prologue), grad_weight.data_ptr(), job.shape, job.threads,
            _is_winograd_gradient(job),
        )  # fmt: skip
    return grad_x, grad_weight, sums


def _empty_backward(
    grad: PendingGrad, x: Tensor, weight: Tensor, conv: Conv, reduce: tuple[Gate, Branch] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_x = aten.conv_backward_data(grad.grad_out, weight, x, conv)
    grad_weight = aten.conv_backward_weight(grad.grad_out, x, weight, conv)
    sums = None if reduce is None else bn_act_backward_reduce(grad_x, reduce[0], (reduce[1],))
    return grad_x, grad_weight, sums


def _gradient(grad: PendingGrad) -> tuple[int, ...]:
    """How grad_y is formed, or where it is."""
    if grad.value is not None:
        return (grad.value.data_ptr(), *_OPEN, 0, 0, 0, 0)
    branch, count = grad.branch, grad.values
    return (
        grad.grad_out.data_ptr(), *_gate(grad.gate), address(branch.y), branch.stats.data_ptr(),
        address(grad.sums) if count else 0, count,
    )  # fmt: skip


def _gate(gate: Gate) -> tuple[int, int, int]:
    """A gate's kind, its activation and its tensor."""
    return gate_code(gate), gate_act_code(gate), address(gate.tensor)


def _data_gradient(
    code: tuple[int, ...],
    x: Tensor,
    weight: Tensor,
    job: _Job,
    accumulate: Tensor | Gated | None,
    reduce: tuple[Gate, Branch] | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of P(x), and the sums of the batch norm in front."""
    packed = _packed_for_now(weight, job, transposed=True)
    residual, residual_gate, added = 0, _OPEN, isinstance(accumulate, Tensor)
    if isinstance(accumulate, Gated):
        residual, residual_gate = accumulate.grad_out.data_ptr(), _gate(accumulate.gate)
    if isinstance(accumulate, Tensor):
        grad_x = accumulate
    else:
        grad_x = empty(x.shape, x.dtype, channels_last=True)
    sums, gate, y, stats = None, _OPEN, 0, 0
    if reduce is not None:
        sums = torch.empty(3, x.shape[1], dtype=torch.float64)
        gate, branch = _gate(reduce[0]), reduce[1]
        y, stats = address(branch.y), branch.stats.data_ptr()
    _kernels.conv_backward_data(
        code, _code(weight), packed.address, grad_x.data_ptr(), added, residual, residual_gate,
        address(sums), gate, y, stats, job.shape, job.threads, packed.winograd,
    )  # fmt: skip
    return grad_x, sums


def _formed(grad_y: Tensor) -> tuple[int, ...]:
    return (grad_y.data_ptr(), *_OPEN, 0, 0, 0, 0)


@register("conv_backward_data", "cpu", why_not=_why_not, name="native")
def conv_backward_data(
    grad_y: Tensor,
    weight: Tensor,
    like: Tensor,
    conv: Conv,
    *,
    accumulate: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """The gradient of the input, added to `accumulate` where that is given."""
    if _is_empty(like, weight):
        return aten.conv_backward_data(grad_y, weight, like, conv)
    if accumulate is not None and not overwrite:
        accumulate = accumulate.clone()
    job = _Job.of(like, weight, conv)
    return _data_gradient(_formed(grad_y), like, weight, job, accumulate, None)[0]


@register("conv_backward_weight", "cpu", why_not=_why_not, name="native")
def conv_backward_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    *,
    prologue: Prologue | None = None,
) -> Tensor:
    """The gradient of the weight."""
    if _is_empty(x, weight):
        return aten.conv_backward_weight(grad_y, x, weight, conv)
    job = _Job.of(x, weight, conv)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, memory_format=torch.channels_last)
    _kernels.conv_backward_weight(
        _formed(grad_y), *_input(x, prologue), grad_weight.data_ptr(), job.shape, job.threads,
        _is_winograd_gradient(job),
    )  # fmt: skip
    return grad_weight
