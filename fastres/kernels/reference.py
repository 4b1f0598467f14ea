"""The truth: every primitive in plain torch, for any floating dtype, with nothing fused.

Imports nothing of fastres. Arithmetic runs in `acc` (float64 by default); what is stored in
between is rounded to the dtype of the activations, exactly where a fused kernel rounds.

Shapes: activations [N, C, H, W]; `state` [2, C] = (mean, M2); `stats` [5, C] = (mean, var,
invstd, scale, shift); `sums` [3, C] = (sum_g, sum_gx of branch 1, of branch 2). The mathematics
stands in docs/design.md section 4 (Ioffe and Szegedy 2015; Chan, Golub and LeVeque 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

F64 = torch.float64


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _store(value: Tensor, like: Tensor, out: Tensor | None = None) -> Tensor:
    """Round to the dtype and layout of `like`, into `out` where there is one."""
    if out is None:
        out = torch.empty_like(like)
    return out.copy_(value)


# ---------------------------------------------------------------- masks


def pack_mask(bits: Tensor, channels_last: bool) -> Tensor:
    """Pack a boolean [N, C, H, W] into bytes, 8 elements each, rows padded to whole bytes."""
    n, c, h, w = bits.shape
    rows = bits.permute(0, 2, 3, 1).reshape(-1, c) if channels_last else bits.reshape(n * c, h * w)
    rows = F.pad(rows.to(torch.uint8), (0, -rows.shape[1] % 8))
    weights = 2 ** torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (rows.unflatten(1, (-1, 8)) * weights).sum(2, dtype=torch.uint8)


def unpack_mask(mask: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Inverse of `pack_mask`, for an activation of `shape`."""
    n, c, h, w = shape
    shifts = torch.arange(8, device=mask.device, dtype=torch.uint8)
    bits = ((mask.unsqueeze(2) >> shifts) & 1).flatten(1).bool()
    if channels_last:
        return bits[:, :c].reshape(n, h, w, c).permute(0, 3, 1, 2)
    return bits[:, : h * w].reshape(n, c, h, w)


# ---------------------------------------------------------------- activation


class Activation(NamedTuple):
    """An elementwise activation by its formulas, each in the dtype that it is given.

    Attributes:
        forward: act(v); torch's autograd can differentiate it.
        derivative: act'(v), from what stands in front of the activation, at a kink as torch's
            backward has it.
        gate: booleans, where act' is 1, from the output, for an activation whose derivative is 0
            or 1 and can be read off there; None for every other one.
        slope: an upper bound of |act'|.
        curvature: an upper bound of |act''| between the kinks; a gate needs none.
        kinks: where act' jumps; a gate needs none.
        kernels: what the kernels of a backend call it by, for an activation from outside: under
            "triton" its value and its derivative as `triton.jit` functions.
    """

    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor] | None = None
    slope: float = 1.0
    curvature: float = 0.0
    kinks: tuple[float, ...] = ()
    kernels: Mapping[str, Any] = MappingProxyType({})


def _relu(v: Tensor) -> Tensor:
    """ReLU lets NaN through and keeps -0.0, as torch's does."""
    return torch.where(v < 0, torch.zeros((), dtype=v.dtype, device=v.device), v)


def _relu6_gate(v: Tensor) -> Tensor:
    """Closed at both kinks and for NaN, as in torch; the output says the same as the input."""
    return (v > 0) & (v < 6)


def _silu_derivative(v: Tensor) -> Tensor:
    s = torch.sigmoid(v)
    return s * (1 + v * (1 - s))


def _gelu_derivative(v: Tensor) -> Tensor:
    """Phi(v) + v*phi(v), of the standard normal distribution."""
    density = torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(v * math.sqrt(0.5))) + v * density


def _gelu_tanh(v: Tensor) -> Tensor:
    return F.gelu(v, approximate="tanh")


def _gelu_tanh_derivative(v: Tensor) -> Tensor:
    """Of v*(1 + tanh(u))/2 with u = sqrt(2/pi)*(v + 0.044715*v^3)."""
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (v + 0.044715 * v * v * v))
    return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * (k * (1 + 3 * 0.044715 * v * v))


def _leaky_relu_derivative(v: Tensor) -> Tensor:
    return torch.where(v > 0, torch.ones_like(v), torch.full_like(v, 0.01))


def _hardswish_derivative(v: Tensor) -> Tensor:
    """The outer pieces have their ends, as in torch from 2.7 on."""
    inner = torch.where(v >= 3, torch.ones_like(v), v / 3 + 0.5)
    return torch.where(v <= -3, torch.zeros_like(v), inner)


#: Activations by name; `fastres.kernels.register_activation` adds to them.
ACTIVATIONS = {
    "none": Activation(
        lambda v: v, torch.ones_like, lambda out: torch.ones_like(out, dtype=torch.bool)
    ),
    # Its gate is not (out <= 0), so NaN passes.
    "relu": Activation(_relu, lambda v: (~(v <= 0)).to(v.dtype), lambda out: ~(out <= 0)),
    # |silu'| ends at 1.0998 and |gelu'| at 1.1289, both |gelu''| at sqrt(2/pi).
    "silu": Activation(F.silu, _silu_derivative, slope=1.1, curvature=0.5),
    "gelu": Activation(F.gelu, _gelu_derivative, slope=1.13, curvature=0.8),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_derivative, slope=1.13, curvature=0.8),
    "leaky_relu": Activation(F.leaky_relu, _leaky_relu_derivative, kinks=(0.0,)),
    "relu6": Activation(F.relu6, lambda v: _relu6_gate(v).to(v.dtype), _relu6_gate),
    "hardswish": Activation(
        F.hardswish, _hardswish_derivative, slope=1.5, curvature=1 / 3, kinks=(-3.0, 3.0)
    ),
}


def formulas_of(act: str) -> Activation:
    """The activation of that name; ValueError for an unknown one."""
    found = ACTIVATIONS.get(act)
    if found is None:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return found


def activate(v: Tensor, act: str) -> Tensor:
    """act(v)."""
    return formulas_of(act).forward(v)


def _open(out: Tensor, act: str) -> Tensor:
    """Where the gradient passes, by the activation's output."""
    gate = formulas_of(act).gate
    if gate is None:
        raise ValueError(f"act must be one whose derivative is 0 or 1, got {act!r}")
    return gate(out)


def _affine(y: Tensor, stats: Tensor, acc: torch.dtype) -> Tensor:
    return y.to(acc) * _per_channel(stats[3].to(acc)) + _per_channel(stats[4].to(acc))


def _affine_stored(y: Tensor, stats: Tensor, act: str, acc: torch.dtype) -> Tensor:
    return _store(activate(_affine(y, stats, acc), act), y)


def gated(
    grad_out: Tensor,
    gate: Any,
    branches: Sequence[Any] = (),
    *,
    channels_last: bool,
    acc: torch.dtype = F64,
) -> Tensor:
    """g = grad_out * act'(.), with act' known the way `gate` says."""
    g = grad_out.to(acc)
    if gate.kind == "none":
        return g
    if formulas_of(gate.act).gate is None:
        return g * _derivative(gate, branches, acc)
    if gate.kind == "mask":
        open_ = unpack_mask(gate.tensor, grad_out.shape, channels_last)
    elif gate.kind == "affine":
        open_ = _open(_affine_stored(branches[0].y, branches[0].stats, gate.act, acc), gate.act)
    else:
        open_ = _open(gate.tensor, gate.act)
    return torch.where(open_, g, torch.zeros((), dtype=acc, device=g.device))


def _derivative(gate: Any, branches: Sequence[Any], acc: torch.dtype) -> Tensor:
    """act'(scale*y + shift) of the first branch, of an activation that is no gate."""
    if gate.kind != "affine":
        raise ValueError(f"gate must be affine for {gate.act!r}, got {gate.kind}")
    return formulas_of(gate.act).derivative(_affine(branches[0].y, branches[0].stats, acc))


# ---------------------------------------------------------------- batch norm


def channel_stats(
    y: Tensor, state: Tensor | None = None, prior_count: int = 0, *, acc: torch.dtype = F64
) -> Tensor:
    """(mean, M2) per channel of y, merged into `state` where that stands for prior values."""
    count = y.numel() // max(y.shape[1], 1)
    if count == 0:
        empty = torch.zeros(2, y.shape[1], dtype=acc, device=y.device)
        return empty if state is None else state
    var, mean = torch.var_mean(y.to(acc), dim=(0, 2, 3), correction=0)
    fresh = torch.stack([mean, var * count])
    if state is None or prior_count == 0:
        return fresh
    total = prior_count + count
    delta = fresh[0] - state[0]
    mean = state[0] + delta * (count / total)
    m2 = state[1] + fresh[1] + delta * delta * (prior_count * count / total)
    return torch.stack([mean, m2])


def finalize_stats(
    state: Tensor | None,
    count: int,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    acc: torch.dtype = F64,
) -> Tensor:
    """`stats` [5, C], computed in float64 and stored in `acc`.

    From batch statistics (`state`, `count`), or from `running` = (running_mean, running_var).
    """
    if state is not None:
        mean, var = state[0].to(F64), state[1].to(F64) / max(count, 1)
    elif running is not None:
        mean, var = running[0].to(F64), running[1].to(F64)
    else:
        raise ValueError("one of state and running must be given, got neither")
    invstd = 1 / torch.sqrt(var + eps)
    scale = invstd if weight is None else weight.to(F64) * invstd
    shift = -mean * scale if bias is None else bias.to(F64) - mean * scale
    return torch.stack([mean, var, invstd, scale, shift]).to(acc)


def scale_shift_act(
    y: Tensor,
    stats: Tensor,
    *,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    act: str = "none",
    want_mask: bool = False,
    out: Tensor | None = None,
    channels_last: bool,
    acc: torch.dtype = F64,
) -> tuple[Tensor, Tensor | None]:
    """act(scale*y + shift [+ residual | + scale_r*residual + shift_r]), and its packed mask."""
    v = _affine(y, stats, acc)
    if residual is not None:
        r = residual.to(acc)
        if residual_stats is not None:
            r = _affine(r, residual_stats, acc)
        v = v + r
    out = _store(activate(v, act), y, out)
    return out, (pack_mask(_open(out, act), channels_last) if want_mask else None)


def scale_shift_act_pool(
    y: Tensor,
    stats: Tensor,
    *,
    pool: Any,
    act: str = "none",
    want_argmax: bool = False,
    channels_last: bool,
    acc: torch.dtype = F64,
) -> tuple[Tensor, Tensor | None]:
    """The maximum over windows of act(scale*y + shift) as stored, and the tap it came from.

    As in torch the last NaN of a window wins, and the first of equal values. The tap is a position
    in the window, counted row by row, as uint8.
    """
    z = _affine_stored(y, stats, act, acc)
    out, indices = F.max_pool2d(z, *pool, return_indices=True)
    taps = taps_of(indices, pool, y.shape[3]) if want_argmax else None
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    argmax = None if taps is None else taps.contiguous(memory_format=fmt)
    return out.contiguous(memory_format=fmt), argmax


def max_pool_backward(
    grad_out: Tensor,
    argmax: Tensor,
    pool: Any,
    size: Sequence[int],
    *,
    channels_last: bool,
    acc: torch.dtype = F64,
) -> Tensor:
    """The gradient of what was pooled, of spatial size `size`, from the taps of the maxima."""
    n, c, _, _ = grad_out.shape
    g, places = grad_out.to(acc).flatten(2), indices_of(argmax, pool, size[1]).flatten(2)
    grad = torch.zeros(n, c, size[0] * size[1], dtype=acc, device=g.device)
    grad = grad.scatter_add(2, places, g).view(n, c, *size).to(grad_out.dtype)
    return grad.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def _corners(t: Tensor, pool: Any) -> tuple[Tensor, Tensor]:
    """Row [OH, 1] and column [OW] of each window's first tap, for outputs [N, C, OH, OW]."""
    top, left = (
        torch.arange(t.shape[2 + axis], device=t.device) * pool.stride[axis] - pool.padding[axis]
        for axis in (0, 1)
    )
    return top.unsqueeze(1), left


def taps_of(indices: Tensor, pool: Any, width: int) -> Tensor:
    """Taps, uint8, out of torch's indices, which count the input's pixels row by row."""
    top, left = _corners(indices, pool)
    row = (indices // width - top) // pool.dilation[0]
    return (row * pool.kernel[1] + (indices % width - left) // pool.dilation[1]).to(torch.uint8)


def indices_of(argmax: Tensor, pool: Any, width: int) -> Tensor:
    """The inverse of `taps_of`."""
    (top, left), taps = _corners(argmax, pool), argmax.long()
    row = top + taps // pool.kernel[1] * pool.dilation[0]
    return row * width + left + taps % pool.kernel[1] * pool.dilation[1]


def bn_act_backward_reduce(
    grad_out: Tensor,
    gate: Any,
    branches: Sequence[Any],
    *,
    sums: Tensor | None = None,
    channels_last: bool,
    acc: torch.dtype = F64,
) -> Tensor:
    """sum_g = sum(g), and per branch sum_gx = sum(g*(y - mean)*invstd); added to `sums`.

    Summed in float64, whatever `acc`: the terms of a batch norm's gradients cancel.
    """
    g = gated(grad_out, gate, branches, channels_last=channels_last, acc=acc)
    fresh = torch.zeros(3, grad_out.shape[1], dtype=F64, device=grad_out.device)
    fresh[0] = g.sum((0, 2, 3), dtype=F64)
    for row, branch in enumerate(branches, start=1):
        if branch.y is not None:
            centred = branch.y.to(acc) - _per_channel(branch.stats[0].to(acc))
            fresh[row] = (g * centred).sum((0, 2, 3), dtype=F64) * branch.stats[2]
    return fresh if sums is None else sums + fresh


def bn_act_backward_apply(
    grad_out: Tensor,
    gate: Any,
    branches: Sequence[Any],
    sums: Tensor,
    count: int,
    *,
    want_grads: Sequence[bool],
    want_residual: bool = False,
    out: Tensor | None = None,
    channels_last: bool,
    acc: torch.dtype = F64,
) -> tuple[list[Tensor | None], Tensor | None]:
    """grad_y = A*g + B*y + C per branch (B = C = 0 where count is 0), and g itself on demand."""
    g = gated(grad_out, gate, branches, channels_last=channels_last, acc=acc)
    grads: list[Tensor | None] = []
    for row, (branch, wanted) in enumerate(zip(branches, want_grads, strict=True), start=1):
        if not wanted:
            grads.append(None)
            continue
        mean, _, invstd, scale, _ = branch.stats.to(acc)
        if count:
            # A*g + B*y + C with the means taken out first: at mean 1e4 and std 1, B*y + C would
            # cancel all but the last digits of float32.
            slope = _per_channel(-scale * invstd * sums[row].to(acc) / count)
            centred = branch.y.to(acc) - _per_channel(mean)
            g_centred = g - _per_channel(sums[0].to(acc) / count)
            value = g_centred * _per_channel(scale) + centred * slope
        else:
            value = g * _per_channel(scale)
        grads.append(_store(value, grad_out, out if row == 1 else None))
    return grads, (_store(g, grad_out) if want_residual else None)


def bn_act_forward(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    act: str = "none",
    want_mask: bool = False,
    channels_last: bool,
    acc: torch.dtype = F64,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`stats` of y as a batch, then `scale_shift_act`: (stats, out, mask)."""
    count = y.numel() // max(y.shape[1], 1)
    stats = finalize_stats(channel_stats(y, acc=acc), count, None, weight, bias, eps, acc=acc)
    out, mask = scale_shift_act(
        y, stats, residual=residual, residual_stats=residual_stats, act=act, want_mask=want_mask,
        channels_last=channels_last, acc=acc,
    )  # fmt: skip
    return stats, out, mask


def bn_act_backward(
    grad_out: Tensor,
    gate: Any,
    branches: Sequence[Any],
    count: int,
    *,
    want_residual: bool = False,
    channels_last: bool,
    acc: torch.dtype = F64,
) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """`bn_act_backward_reduce`, then `apply` for every branch: (sums, grads, grad_residual)."""
    more: dict[str, Any] = {"channels_last": channels_last, "acc": acc}
    sums = bn_act_backward_reduce(grad_out, gate, branches, **more)
    grads, residual = bn_act_backward_apply(
        grad_out, gate, branches, sums, count, want_grads=[True] * len(branches),
        want_residual=want_residual, **more,
    )  # fmt: skip
    return sums, grads, residual


def update_running(updates: Sequence[Any], *, acc: torch.dtype = F64) -> None:
    """Take a batch into running statistics in place, as nn.BatchNorm2d does, one after another.

    counter += 1; running = (1 - momentum)*running + momentum*batch, with the unbiased variance.

    Args:
        updates: (stats [5, C], running_mean [C] or None, running_var [C] or None, 0-d integer
            counter or None, momentum, values per channel) each, by these names; a momentum of
            None is 1/counter after the increment, 0 without a counter.
        acc: dtype of the arithmetic; what is stored has its own.
    """
    with torch.no_grad():
        for u in updates:
            if u.counter is not None:
                u.counter.add_(1)
            factor = u.momentum
            if factor is None:
                factor = 0.0 if u.counter is None else 1.0 / u.counter.to(acc)
            elif isinstance(factor, Tensor):
                factor = factor.to(acc)
            unbiased = math.inf if u.count == 1 else u.count / (u.count - 1)
            for running, row, scale in ((u.running_mean, 0, 1.0), (u.running_var, 1, unbiased)):
                if running is not None:
                    batch = u.stats[row].to(acc) * scale
                    running.copy_((1 - factor) * running.to(acc) + factor * batch)


# ---------------------------------------------------------------- residual add


def add_act(
    x: Tensor,
    residual: Tensor,
    *,
    act: str = "relu",
    want_mask: bool = False,
    channels_last: bool,
    acc: torch.dtype = F64,
) -> tuple[Tensor, Tensor | None]:
    """act(x + residual), and its packed mask."""
    out = _store(activate(x.to(acc) + residual.to(acc), act), x)
    return out, (pack_mask(_open(out, act), channels_last) if want_mask else None)


def act_backward(
    grad_out: Tensor,
    gate: Any,
    *,
    out: Tensor | None = None,
    channels_last: bool,
    acc: torch.dtype = F64,
) -> Tensor:
    """g = gate(grad_out): the gradient of both inputs of `add_act`."""
    return _store(gated(grad_out, gate, channels_last=channels_last, acc=acc), grad_out, out)


# ---------------------------------------------------------------- convolution


def _input_of(x: Tensor, prologue: Any, acc: torch.dtype) -> Tensor:
    """The convolution's real input: x, or act(scale*x + shift) rounded to x's dtype."""
    return x if prologue is None else _affine_stored(x, prologue.stats, prologue.act, acc)


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Any,
    *,
    prologue: Any = None,
    want_state: bool = False,
    acc: torch.dtype = F64,
) -> tuple[Tensor, Tensor | None]:
    """y = conv(P(x), weight) + bias, and on demand the `state` of y as stored.

    Zero padding applies after the prologue P(x) = act(scale*x + shift).
    """
    z = _input_of(x, prologue, acc).to(acc)
    b = None if bias is None else bias.to(acc)
    y = F.conv2d(z, weight.to(acc), b, conv.stride, conv.padding, conv.dilation, conv.groups)
    y = y.to(x.dtype)
    return y, (channel_stats(y, acc=acc) if want_state else None)


def conv_backward_data(
    grad_y: Tensor,
    weight: Tensor,
    like: Tensor,
    conv: Any,
    *,
    accumulate: Tensor | None = None,
    overwrite: bool = False,
    acc: torch.dtype = F64,
) -> Tensor:
    """Gradient of the convolution's input (shape and layout of `like`), plus `accumulate`.

    With `overwrite` the memory of `accumulate` is nobody else's, and may become the result's.
    """
    grad = conv2d_input(
        like.shape, weight.to(acc), grad_y.to(acc), conv.stride, conv.padding, conv.dilation,
        conv.groups,
    )  # fmt: skip
    if accumulate is not None:
        grad = grad + accumulate.to(acc)
    return _store(grad, like)


def conv_backward_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Any,
    *,
    prologue: Any = None,
    acc: torch.dtype = F64,
) -> Tensor:
    """Gradient of the weight, in its dtype."""
    z = _input_of(x, prologue, acc).to(acc)
    grad = conv2d_weight(
        z, weight.shape, grad_y.to(acc), conv.stride, conv.padding, conv.dilation, conv.groups
    )
    return grad.to(weight.dtype)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Any,
    stats: Tensor,
    *,
    residual: Tensor | None = None,
    act: str = "none",
    acc: torch.dtype = F64,
) -> Tensor:
    """Inference: act(scale*(conv(x, weight) + bias) + shift + residual), rounded once."""
    b = None if bias is None else bias.to(acc)
    y = F.conv2d(
        x.to(acc), weight.to(acc), b, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    v = _affine(y, stats, acc)
    if residual is not None:
        v = v + residual.to(acc)
    return activate(v, act).to(x.dtype)
