"""Calls of each primitive: the inputs that a case stands for, in every variant of the signature.

A `Call` is what an implementation is asked and given. The inputs are realistic: statistics are
those of the tensor they come with, masks have padding bits of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastres import reference
from fastres.primitives import (
    Branch,
    Gate,
    Gated,
    PendingGrad,
    Prologue,
    Request,
    acc_dtype,
    dense,
    implementations,
    is_channels_last,
)
from fastres.testing.cases import Case

F64 = torch.float64


@dataclass(frozen=True)
class Call:
    """One call of a primitive.

    Attributes:
        label: the variant, for messages.
        request: what the implementation's predicate is asked.
        args: positional arguments.
        kwargs: keyword arguments.
        in_place: index of the positional argument that is also given as `out`, or None.
    """

    label: str
    request: Request
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    in_place: int | None = None


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of a case, in the dtypes that a backend's own primitives use."""

    case: Case
    backend: str
    device: str = "cpu"

    def request(self, like: Tensor, **more: Any) -> Request:
        """A request for activations like this one."""
        return Request(self.device, like.dtype, is_channels_last(like), **more)

    def x(self, salt: str = "x", shape: tuple[int, ...] | None = None) -> Tensor:
        """An activation."""
        return self.case.activation(salt, shape=shape, device=self.device)

    def grad(self, salt: str = "grad", shape: tuple[int, ...] | None = None) -> Tensor:
        """A gradient."""
        return self.case.gradient(salt, shape=shape, device=self.device)

    def vector(self, salt: str, size: int, near: float = 0.0) -> Tensor:
        """A parameter of a batch norm: float32, or float64 beside float64 activations."""
        dtype = acc_dtype(self.case.dtype)
        return self.case.vector(salt, size, near=near, dtype=dtype, device=self.device)

    def own(self, primitive: str, value: Tensor) -> Tensor:
        """`value` (a state or sums) in the dtype in which the backend itself hands it over."""
        name = "channel_stats" if primitive == "state" else "bn_act_backward_reduce"
        probe = self.case.activation("probe", shape=(1, 1, 1, 2), device=self.device)
        stats = torch.ones(5, 1, dtype=acc_dtype(probe.dtype), device=self.device)
        for entry in implementations(name, self.backend):
            if entry.why_not(self.request(probe)) is None:
                args = () if primitive == "state" else (Gate("none"), (Branch(probe, stats),))
                return value.to(entry.run(probe, *args).dtype)
        return value.to(acc_dtype(self.case.dtype))

    def stats(self, y: Tensor, salt: str = "stats") -> Tensor:
        """`stats` [5, C] of y; in exact cases powers of two and integers, whatever y is."""
        c, dtype = y.shape[1], acc_dtype(y.dtype)
        weight, bias = self.vector(salt + "w", c, 1.0), self.vector(salt + "b", c, 0.2)
        if self.case.exact:
            mean, invstd = self.vector(salt + "m", c), self.vector(salt + "i", c, 1.0)
            scale = weight * invstd
            return torch.stack([mean, invstd.pow(-2), invstd, scale, bias - mean * scale])
        count = y.numel() // max(c, 1)
        state = reference.channel_stats(y.to(F64))
        return reference.finalize_stats(state, count, None, weight, bias, 1e-5, acc=dtype)

    def running(self, size: int) -> tuple[Tensor, Tensor]:
        """(running_mean, running_var)."""
        return self.vector("mean", size), self.vector("var", size, 1.0).abs()

    def open_gate(self, like: Tensor) -> Tensor:
        """A random boolean activation."""
        bits = torch.rand(like.shape, generator=self.case.generator("gate")) < 0.6
        return bits.to(self.device)


def calls(primitive: str, case: Case, backend: str, device: str = "cpu") -> Iterator[Call]:
    """All calls of a primitive that a case stands for; none where it has no convolution."""
    if case.conv is None and primitive.startswith("conv_"):
        return
    yield from _CALLS[primitive](Maker(case, backend, device))


# ---------------------------------------------------------------- batch norm, forward


def _channel_stats(m: Maker) -> Iterator[Call]:
    y = m.x()
    yield Call("whole", m.request(y), (y,))
    if m.case.count and not m.case.exact:
        prior = m.x("prior")
        state = m.own("state", reference.channel_stats(prior.to(F64)))
        yield Call("merged", m.request(y), (y, state, m.case.count))


def _finalize_stats(m: Maker) -> Iterator[Call]:
    y = m.x()
    c, count, acc = y.shape[1], m.case.count, acc_dtype(y.dtype)
    state = m.own("state", reference.channel_stats(y.to(F64)))
    weight, bias = m.vector("w", c, 1.0), m.vector("b", c)
    request, more = m.request(y), {"acc": acc}
    yield Call("batch", request, (state, count, None, weight, bias, 1e-5), more)
    yield Call("plain", request, (state, count, None, None, None, 0.5), more)
    yield Call("weight only", request, (state, count, None, weight, None, 1e-3), more)
    yield Call("running", request, (None, count, m.running(c), weight, bias, 1e-5), more)


def _scale_shift_act(m: Maker) -> Iterator[Call]:
    y, r = m.x(), m.x("residual")
    stats, other = m.stats(y), m.stats(r, "residual")
    for act in ("none", "relu"):
        request = m.request(y, act=act)
        for label, more in (
            ("alone", {}),
            ("residual", {"residual": r}),
            ("projection", {"residual": r, "residual_stats": other}),
        ):
            yield Call(f"{label}, {act}", request, (y, stats), {"act": act, **more})
    masked = {"residual": r, "residual_stats": other, "act": "relu", "want_mask": True}
    yield Call("mask", m.request(y, act="relu"), (y, stats), masked)
    yield Call("in place", m.request(y), (y, stats), {"residual": r, "act": "relu"}, 0)


def _add_act(m: Maker) -> Iterator[Call]:
    x, r = m.x(), m.x("residual")
    for act, want in (("none", False), ("relu", False), ("relu", True)):
        more = {"act": act, "want_mask": want}
        label = f"{act}, mask" if want else act
        yield Call(label, m.request(x, act=act), (x, r), more)


# ---------------------------------------------------------------- batch norm, backward


def _unambiguous(grad: Tensor, y: Tensor, stats: Tensor) -> Tensor:
    """`grad` without the places where the sign of scale*y + shift is within rounding of zero.

    A recomputed gate may go either way there, and the gradient with it: 4 roundings, of the
    product, the sum, the scale and the shift.
    """
    scale, shift = (row.view(1, -1, 1, 1).to(F64) for row in stats[3:])
    product = y.to(F64) * scale
    band = 4 * torch.finfo(stats.dtype).eps * (product.abs() + shift.abs())
    return grad.clone().masked_fill_((product + shift).abs() <= band, 0)


def _gates(m: Maker, grad: Tensor, y: Tensor, stats: Tensor) -> Iterator[tuple[Tensor, Gate]]:
    """(gradient, gate) for every kind of gate."""
    last = is_channels_last(y)
    yield grad, Gate("none", None, "none")
    yield grad, Gate("mask", reference.pack_mask(m.open_gate(y), last))
    exact = m.case.exact
    yield grad if exact else _unambiguous(grad, y, stats), Gate("affine", None)
    out, _ = reference.scale_shift_act(y, stats, act="relu", channels_last=last)
    yield grad, Gate("out", out)


def _bn_act_backward_reduce(m: Maker) -> Iterator[Call]:
    y, side, grad = m.x(), m.x("side"), m.grad()
    one, two = Branch(y, m.stats(y)), Branch(side, m.stats(side, "side"))
    request = m.request(y, act="relu")
    for g, gate in _gates(m, grad, y, one.stats):
        yield Call(f"{gate.kind}", request, (g, gate, (one,)))
    mask = Gate("mask", reference.pack_mask(m.open_gate(y), is_channels_last(y)))
    yield Call("two branches", request, (grad, mask, (one, two)))
    prior = m.own("sums", m.vector("prior", 3 * y.shape[1]).view(3, -1))
    yield Call("added", request, (grad, mask, (one, two)), {"sums": prior})


def _bn_act_backward_apply(m: Maker) -> Iterator[Call]:
    y, side, grad = m.x(), m.x("side"), m.grad()
    one, two = Branch(y, m.stats(y)), Branch(side, m.stats(side, "side"))
    request, count = m.request(y, act="relu"), m.case.count
    for g, gate in _gates(m, grad, y, one.stats):
        sums = _sums(m, g, gate, (one,))
        yield Call(gate.kind, request, (g, gate, (one,), sums, count), {"want_grads": (True,)})
        yield Call(
            f"{gate.kind}, running statistics", request, (g, gate, (one,), sums, 0),
            {"want_grads": (True,)},
        )  # fmt: skip
    mask = Gate("mask", reference.pack_mask(m.open_gate(y), is_channels_last(y)))
    sums = _sums(m, grad, mask, (one, two))
    for want in ((True, True), (False, True), (True, False)):
        more = {"want_grads": want, "want_residual": want[0]}
        yield Call(f"two branches {want}", request, (grad, mask, (one, two), sums, count), more)
    more = {"want_grads": (True,), "want_residual": True}
    yield Call("residual", request, (grad, mask, (one,), sums, count), more)
    args = (grad, mask, (one,), sums, count)
    yield Call("in place", request, args, {"want_grads": (True,)}, 0)


def _sums(m: Maker, grad: Tensor, gate: Gate, branches: tuple[Branch, ...]) -> Tensor:
    found = reference.bn_act_backward_reduce(
        grad, gate, branches, channels_last=is_channels_last(grad)
    )
    return m.own("sums", found)


def _act_backward(m: Maker) -> Iterator[Call]:
    grad, x = m.grad(), m.x()
    for g, gate in _gates(m, grad, x, m.stats(x)):
        if gate.kind != "affine":
            yield Call(gate.kind, m.request(g, act=gate.act), (g, gate))
    yield Call("in place", m.request(grad, act="relu"), (grad, Gate("out", x)), {}, 0)


# ---------------------------------------------------------------- convolutions


def _conv_request(m: Maker, x: Tensor, *features: str, act: str = "none") -> Request:
    return m.request(
        x, act=act, conv=m.case.conv, kernel=m.case.kernel, features=frozenset(features)
    )


def _output_shape(m: Maker) -> tuple[int, int, int, int]:
    assert m.case.conv is not None
    n, _, *size = m.case.shape
    h, w = m.case.conv.output_size(size, m.case.kernel)
    return n, m.case.out_channels, h, w


def _conv_forward(m: Maker) -> Iterator[Call]:
    x, w, conv = m.x(), m.case.weight(device=m.device), m.case.conv
    bias = m.vector("bias", m.case.out_channels).to(x.dtype)
    prologue = Prologue(m.stats(x), "relu")
    yield Call("plain", _conv_request(m, x), (x, w, None, conv))
    yield Call("bias", _conv_request(m, x), (x, w, bias, conv))
    yield Call("stats", _conv_request(m, x, "stats"), (x, w, bias, conv), {"want_state": True})
    yield Call("prologue", _conv_request(m, x, "prologue"), (x, w, None, conv),
               {"prologue": prologue})  # fmt: skip
    both = _conv_request(m, x, "stats", "prologue")
    yield Call("both", both, (x, w, None, conv), {"prologue": prologue, "want_state": True})


def _conv_backward_data(m: Maker) -> Iterator[Call]:
    x, w, conv = m.x(), m.case.weight(device=m.device), m.case.conv
    grad_y = m.grad(shape=_output_shape(m))
    yield Call("plain", _conv_request(m, x), (grad_y, w, x, conv))
    more = {"accumulate": m.grad("other")}
    yield Call("accumulate", _conv_request(m, x), (grad_y, w, x, conv), more)


def _conv_backward_weight(m: Maker) -> Iterator[Call]:
    x, w, conv = m.x(), m.case.weight(device=m.device), m.case.conv
    grad_y = m.grad(shape=_output_shape(m))
    yield Call("plain", _conv_request(m, x), (grad_y, x, w, conv))
    more = {"prologue": Prologue(m.stats(x), "relu")}
    yield Call("prologue", _conv_request(m, x, "prologue"), (grad_y, x, w, conv), more)


def _conv_bn_act(m: Maker) -> Iterator[Call]:
    x, w, conv = m.x(), m.case.weight(device=m.device), m.case.conv
    shape = _output_shape(m)
    y = reference.conv_forward(x, w, None, conv)[0]
    bias = m.vector("bias", shape[1]).to(x.dtype)
    for act in ("none", "relu"):
        request = _conv_request(m, x, act=act)
        yield Call(act, request, (x, w, None, conv, m.stats(y)), {"act": act})
        more = {"act": act, "residual": m.x("residual", shape)}
        yield Call(f"{act}, residual", request, (x, w, bias, conv, m.stats(y)), more)


def _conv_backward(m: Maker) -> Iterator[Call]:
    """The composite: gated gradient of this unit in, gradients and the previous unit's sums out."""
    w, conv, below = m.case.weight(device=m.device), m.case.conv, _below(m)
    raw = below.y
    assert raw is not None
    fmt = torch.channels_last if m.case.channels_last else torch.contiguous_format
    y = dense(reference.conv_forward(raw, w, None, conv)[0], fmt)
    branch = Branch(y, m.stats(y))
    grad = m.grad(shape=tuple(y.shape))
    request, last = _conv_request(m, raw, act="relu"), is_channels_last(y)
    mask = Gate("mask", reference.pack_mask(m.open_gate(y), last))
    reduce = (Gate("affine", None), below)
    prologue = Prologue(below.stats, "relu")
    for g, gate in ((grad, mask), (_unambiguous(grad, y, branch.stats), Gate("affine", None))):
        for count in (y.numel() // y.shape[1], 0):
            pending = PendingGrad(g, gate, branch, _sums(m, g, gate, (branch,)), count)
            for label, more in _wishes(m, raw, prologue, reduce).items():
                kind = f"{gate.kind}, {'running' if count == 0 else 'batch'}, {label}"
                yield Call(kind, request, (pending, raw, w, conv), more)


def _below(m: Maker) -> Branch:
    """The previous unit's raw output, moved off the places where its gate would be ambiguous."""
    raw = m.x()
    stats = m.stats(raw, "below")
    if m.case.exact:
        return Branch(raw, stats)
    ambiguous = _unambiguous(torch.ones_like(raw), raw, stats) == 0
    clear = ((1 - stats[4]) / stats[3]).view(1, -1, 1, 1).to(raw.dtype)
    return Branch(raw.copy_(torch.where(ambiguous, clear, raw)), stats)


def _wishes(
    m: Maker, x: Tensor, prologue: Prologue, reduce: tuple[Gate, Branch]
) -> dict[str, dict[str, Any]]:
    """What the engine asks of a unit's backward, by name."""
    gate = Gate("mask", reference.pack_mask(m.open_gate(x), is_channels_last(x)))
    common: dict[str, Any] = {
        "prologue": None, "want_x": True, "want_weight": True, "accumulate": None, "reduce": None,
    }  # fmt: skip
    return {
        "first": common,
        "added": {**common, "accumulate": m.grad("other")},
        "gated": {**common, "accumulate": Gated(m.grad("other"), gate)},
        "inner": {**common, "prologue": prologue, "reduce": reduce},
        "kept": {**common, "reduce": reduce},
        "data only": {**common, "want_weight": False},
        "weight only": {**common, "want_x": False, "prologue": prologue},
    }


_CALLS: dict[str, Callable[[Maker], Iterator[Call]]] = {
    "channel_stats": _channel_stats,
    "finalize_stats": _finalize_stats,
    "scale_shift_act": _scale_shift_act,
    "bn_act_backward_reduce": _bn_act_backward_reduce,
    "bn_act_backward_apply": _bn_act_backward_apply,
    "add_act": _add_act,
    "act_backward": _act_backward,
    "conv_forward": _conv_forward,
    "conv_backward_data": _conv_backward_data,
    "conv_backward_weight": _conv_backward_weight,
    "conv_bn_act": _conv_bn_act,
    "conv_backward": _conv_backward,
}
