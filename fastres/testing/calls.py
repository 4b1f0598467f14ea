"""Calls of each primitive: the inputs that a case stands for, in every variant of the signature.

A `Call` is what an implementation is asked and given. The inputs are realistic: statistics are
those of the tensor they come with, masks have padding bits of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import (
    Branch,
    Gate,
    Gated,
    MaxPool,
    PendingGrad,
    Prologue,
    Request,
    RunningUpdate,
    acc_dtype,
    dense,
    is_channels_last,
    reference,
)
from fastres.testing.builder import (
    Builder,
    Call,
    column,
    expanded,
    is_gate,
    tagged,
    unambiguous,
)
from fastres.testing.cases import Case


def calls(primitive: str, case: Case, backend: str, device: str = "cpu") -> Iterator[Call]:
    """All calls of a primitive that a case stands for; none where it has no convolution."""
    if case.conv is None and primitive.startswith("conv_"):
        return
    yield from _CALLS[primitive](Builder(case, backend, device))


# ---------------------------------------------------------------- batch norm, forward


def _state(m: Builder, y: Tensor) -> Tensor:
    return m.as_returned("channel_stats", reference.channel_stats(y.to(torch.float64)))


def _channel_stats(m: Builder) -> Iterator[Call]:
    y = m.x()
    yield Call("whole", m.request(y), (y,))
    if m.case.count and not m.case.exact:
        yield Call("merged", m.request(y), (y, _state(m, m.x("prior")), m.case.count))


def _finalize_stats(m: Builder) -> Iterator[Call]:
    y = m.x()
    c, count, acc = y.shape[1], m.case.count, acc_dtype(y.dtype)
    state = _state(m, y)
    weight, bias = m.vector("w", c, 1.0), m.vector("b", c)
    request, more = m.request(y), {"acc": acc}
    yield Call("batch", request, (state, count, None, weight, bias, 1e-5), more)
    yield Call("plain", request, (state, count, None, None, None, 0.5), more)
    yield Call("weight only", request, (state, count, None, weight, None, 1e-3), more)
    yield Call("running", request, (None, count, m.running(c), weight, bias, 1e-5), more)
    mean, var = m.running(c)
    views = (column(mean), column(var)), column(weight), column(bias)
    yield Call("running, columns", request, (None, count, *views, 1e-5), more)
    one = expanded(weight.abs() + 0.5), expanded(bias)
    yield Call("batch, expanded", request, (state, count, None, *one, 1e-5), more)


def _scale_shift_act(m: Builder) -> Iterator[Call]:
    y, r = m.x(), m.x("residual")
    stats, other = m.stats(y), m.stats(r, "residual")
    for act in ("none", *m.acts):
        request = m.request(y, act=act)
        ends: dict[str, dict[str, Any]] = {
            "residual": {"residual": r},
            "projection": {"residual": r, "residual_stats": other},
        }
        for label, more in {"alone": {}, **(ends if is_gate(act) else {})}.items():
            yield Call(f"{label}, {act}", request, (y, stats), {"act": act, **more})
        if act != "none":
            more = {"residual": r} if is_gate(act) else {}
            yield Call(tagged("in place", act), request, (y, stats), {"act": act, **more}, 0)
        if act != "none" and is_gate(act):
            masked = {**ends["projection"], "act": act, "want_mask": True}
            yield Call(tagged("mask", act), request, (y, stats), masked)


#: Windows that overlap, that do not, that reach beyond an edge, and that leave pixels out.
_POOLS = {
    "3x3": MaxPool((3, 3), (2, 2), (1, 1)),
    "2x2": MaxPool((2, 2), (2, 2)),
    "ceil": MaxPool((3, 2), (2, 3), (0, 1), ceil_mode=True),
    "dilated": MaxPool((2, 3), (1, 2), (1, 1), (2, 1)),
}


def _pools(m: Builder) -> Iterator[tuple[str, MaxPool]]:
    """The poolings that a case's size allows, by name."""
    size = m.case.shape[2:]
    return ((name, pool) for name, pool in _POOLS.items() if pool.why_not(size) is None)


def _scale_shift_act_pool(m: Builder) -> Iterator[Call]:
    y = m.x()
    stats = m.stats(y)
    for name, pool in _pools(m):
        for act in ("none", *m.acts) if name == "3x3" else ("relu",):
            more = {"pool": pool, "act": act, "want_argmax": True}
            yield Call(f"{name}, {act}", m.request(y, act=act), (y, stats), more)
    for name, pool in [*_pools(m)][:1]:
        more = {"pool": pool, "act": "relu"}
        yield Call(f"{name}, no argmax", m.request(y, act="relu"), (y, stats), more)


def _max_pool_backward(m: Builder) -> Iterator[Call]:
    y = m.x()
    last, size = is_channels_last(y), m.case.shape[2:]
    for name, pool in _pools(m):
        _, argmax = reference.scale_shift_act_pool(
            y, m.stats(y), pool=pool, act="relu", want_argmax=True, channels_last=last
        )
        assert argmax is not None
        grad = m.grad(shape=tuple(argmax.shape))
        yield Call(name, m.request(grad), (grad, argmax, pool, size))


def _add_act(m: Builder) -> Iterator[Call]:
    x, r = m.x(), m.x("residual")
    gates = [act for act in m.acts if is_gate(act)]
    for act, want in (("none", False), *((act, want) for act in gates for want in (False, True))):
        more = {"act": act, "want_mask": want}
        label = f"{act}, mask" if want else act
        yield Call(label, m.request(x, act=act), (x, r), more)


def _update_running(m: Builder) -> Iterator[Call]:
    """Two batch norms of which the second one's momentum varies; it may have no buffers at all."""
    if m.case.count < 2:
        return
    y, count = m.x(), m.case.count
    stats, c = m.stats(y), y.shape[1]
    request = Request(m.device, stats.dtype, False)
    counter = torch.tensor(4, device=m.device)
    first = RunningUpdate(stats, *m.running(c), counter, 0.1, count)
    second = RunningUpdate(m.stats(y, "other"), *m.running(c), counter.clone(), 0.5, count)
    yield Call("momentum", request, ((first, second),))
    yield Call("cumulative", request, ((first, second._replace(momentum=None)),))
    bare = second._replace(running_mean=None, running_var=None, counter=None)
    yield Call("no buffers", request, ((first, bare),))


# ---------------------------------------------------------------- batch norm, backward


def _gates(m: Builder, grad: Tensor, y: Tensor, stats: Tensor) -> Iterator[tuple[Tensor, Gate]]:
    """(gradient, gate) for every kind of gate that an activation has."""
    last = is_channels_last(y)
    yield grad, Gate("none", None, "none")
    for act in m.acts:
        if not is_gate(act):
            yield unambiguous(grad, y, stats, act), Gate("affine", None, act)
            continue
        yield grad, m.mask(y, act)
        clear = grad if m.case.exact else unambiguous(grad, y, stats, act)
        yield clear, Gate("affine", None, act)
        out, _ = reference.scale_shift_act(y, stats, act=act, channels_last=last)
        yield grad, Gate("out", out, act)


def _branches(m: Builder) -> tuple[Branch, Branch]:
    """The main path's branch and the projection's."""
    y, side = m.x(), m.x("side")
    return Branch(y, m.stats(y)), Branch(side, m.stats(side, "side"))


def _bn_act_backward_reduce(m: Builder) -> Iterator[Call]:
    y, grad, (one, two) = m.x(), m.grad(), _branches(m)
    prior = m.as_returned("bn_act_backward_reduce", m.vector("prior", 3 * y.shape[1]).view(3, -1))
    for g, gate in _gates(m, grad, y, one.stats):
        request, args = m.request(y, act=gate.act), (g, gate, (one,))
        yield Call(tagged(gate.kind, gate.act), request, args)
        if not is_gate(gate.act):
            yield Call(tagged("added", gate.act), request, args, {"sums": prior})
    request, mask = m.request(y, act="relu"), m.mask(y)
    yield Call("two branches", request, (grad, mask, (one, two)))
    yield Call("added", request, (grad, mask, (one, two)), {"sums": prior})


def _bn_act_backward_apply(m: Builder) -> Iterator[Call]:
    y, grad, (one, two) = m.x(), m.grad(), _branches(m)
    count, more = m.case.count, {"want_grads": (True,)}
    for g, gate in _gates(m, grad, y, one.stats):
        request, label = m.request(y, act=gate.act), tagged(gate.kind, gate.act)
        args = (g, gate, (one,), _sums(m, g, gate, (one,)))
        yield Call(label, request, (*args, count), more)
        yield Call(f"{label}, running statistics", request, (*args, 0), more)
        if not is_gate(gate.act):
            yield Call(tagged("in place", gate.act), request, (*args, count), more, 0)
    request, mask = m.request(y, act="relu"), m.mask(y)
    sums = _sums(m, grad, mask, (one, two))
    for want in ((True, True), (False, True), (True, False)):
        wishes = {"want_grads": want, "want_residual": want[0]}
        yield Call(f"two branches {want}", request, (grad, mask, (one, two), sums, count), wishes)
    alone = (grad, mask, (one,), sums, count)
    yield Call("residual", request, alone, {**more, "want_residual": True})
    yield Call("in place", request, alone, more, 0)


def _bn_act_forward(m: Builder) -> Iterator[Call]:
    if m.case.exact or not m.case.count:  # it divides and takes a root
        return
    y, r = m.x(), m.x("residual")
    weight, bias = m.vector("w", y.shape[1], 1.0), m.vector("b", y.shape[1])
    end = {"residual": r, "act": "relu"}
    other = m.stats(r, "residual")
    yield Call("plain", m.request(y), (y, None, None, 1e-3))
    relu = m.request(y, act="relu")
    for act in m.acts:
        args = (y, weight, bias, 1e-5)
        yield Call(tagged("inner", act), m.request(y, act=act), args, {"act": act})
    views = (y, column(weight), expanded(bias), 1e-5)
    yield Call("inner, views", relu, views, {"act": "relu"})
    yield Call("residual", relu, (y, weight, bias, 1e-5), {**end, "want_mask": True})
    yield Call("projection", relu, (y, weight, bias, 1e-5), {**end, "residual_stats": other})


def _bn_act_backward(m: Builder) -> Iterator[Call]:
    y, grad, (one, two) = m.x(), m.grad(), _branches(m)
    for g, gate in _gates(m, grad, y, one.stats):
        request = m.request(y, act=gate.act)
        yield Call(tagged(gate.kind, gate.act), request, (g, gate, (one,), m.case.count))
    request, mask = m.request(y, act="relu"), m.mask(y)
    both, more = (grad, mask, (one, two), m.case.count), {"want_residual": True}
    yield Call("two branches", request, both)
    yield Call("residual", request, (grad, mask, (one,), m.case.count), more)
    yield Call("running statistics", request, (grad, mask, (one,), 0), more)


def _sums(m: Builder, grad: Tensor, gate: Gate, branches: tuple[Branch, ...]) -> Tensor:
    last = is_channels_last(grad)
    sums = reference.bn_act_backward_reduce(grad, gate, branches, channels_last=last)
    return m.as_returned("bn_act_backward_reduce", sums)


def _act_backward(m: Builder) -> Iterator[Call]:
    grad, x = m.grad(), m.x()
    for g, gate in _gates(m, grad, x, m.stats(x)):
        if gate.kind != "affine":
            yield Call(tagged(gate.kind, gate.act), m.request(g, act=gate.act), (g, gate))
    yield Call("in place", m.request(grad, act="relu"), (grad, Gate("out", x)), {}, 0)


# ---------------------------------------------------------------- convolutions


def _conv_request(m: Builder, x: Tensor, *features: str, act: str = "none") -> Request:
    return m.request(
        x, act=act, conv=m.case.conv, weight=m.case.weight_shape, features=frozenset(features)
    )


def _output_shape(m: Builder) -> tuple[int, int, int, int]:
    assert m.case.conv is not None
    n, _, *size = m.case.shape
    h, w = m.case.conv.output_size(size, m.case.kernel)
    return n, m.case.out_channels, h, w


def _conv_forward(m: Builder) -> Iterator[Call]:
    x, w, conv = m.x(), m.weight, m.case.conv
    bias = m.vector("bias", m.case.out_channels).to(x.dtype)
    stats = m.stats(x)
    yield Call("plain", _conv_request(m, x), (x, w, None, conv))
    yield Call("bias", _conv_request(m, x), (x, w, bias, conv))
    yield Call("bias, column", _conv_request(m, x), (x, w, column(bias), conv))
    yield Call("stats", _conv_request(m, x, "stats"), (x, w, bias, conv), {"want_state": True})
    for act in m.acts:
        alone, both = (_conv_request(m, x, "prologue", *more, act=act) for more in ((), ("stats",)))
        prologue = {"prologue": Prologue(stats, act)}
        yield Call(tagged("prologue", act), alone, (x, w, None, conv), prologue)
        more = {**prologue, "want_state": True}
        yield Call(tagged("both", act), both, (x, w, None, conv), more)


def _conv_backward_data(m: Builder) -> Iterator[Call]:
    x, w, conv = m.x(), m.weight, m.case.conv
    grad_y = m.grad(shape=_output_shape(m))
    yield Call("plain", _conv_request(m, x), (grad_y, w, x, conv))
    more: dict[str, Any] = {"accumulate": m.grad("other")}
    yield Call("accumulate", _conv_request(m, x), (grad_y, w, x, conv), more)
    more = {**more, "overwrite": True}
    yield Call("overwrite", _conv_request(m, x), (grad_y, w, x, conv), more)


def _conv_backward_weight(m: Builder) -> Iterator[Call]:
    x, w, conv = m.x(), m.weight, m.case.conv
    grad_y = m.grad(shape=_output_shape(m))
    yield Call("plain", _conv_request(m, x), (grad_y, x, w, conv))
    for act in m.acts:
        request = _conv_request(m, x, "prologue", act=act)
        more = {"prologue": Prologue(m.stats(x), act)}
        yield Call(tagged("prologue", act), request, (grad_y, x, w, conv), more)


def _conv_bn_act(m: Builder) -> Iterator[Call]:
    x, w, conv = m.x(), m.weight, m.case.conv
    shape = _output_shape(m)
    y = reference.conv_forward(x, w, None, conv)[0]
    bias = m.vector("bias", shape[1]).to(x.dtype)
    for act in ("none", *m.acts):
        request = _conv_request(m, x, act=act)
        yield Call(act, request, (x, w, None, conv, m.stats(y)), {"act": act})
        if not is_gate(act):
            continue
        more = {"act": act, "residual": m.x("residual", shape)}
        yield Call(f"{act}, residual", request, (x, w, bias, conv, m.stats(y)), more)
        yield Call(f"{act}, bias column", request, (x, w, column(bias), conv, m.stats(y)), more)


def _conv_backward(m: Builder) -> Iterator[Call]:
    """The composite: gated gradient of this unit in, gradients and the previous unit's sums out."""
    for act in m.acts:
        below = _below(m, act)
        assert below.y is not None
        wishes = _wishes(m, below.y, Prologue(below.stats, act), (Gate("affine", None, act), below))
        if act != "relu":  # which is in all the others
            wishes = {"inner": wishes["inner"]}
        for pending in _pending(m, below.y, act):
            batch = "batch" if pending.values else "running"
            for label, more in wishes.items():
                kind = tagged(f"{pending.gate.kind}, {batch}, {label}", act)
                request = _conv_request(m, below.y, act=act)
                args = (pending, below.y, m.weight, m.case.conv)
                yield Call(kind, request, args, more)


def _pending(m: Builder, x: Tensor, act: str) -> Iterator[PendingGrad]:
    """Gradients of the output of the unit that is given x, for both kinds of statistics."""
    y, _ = reference.conv_forward(x, m.weight, None, m.case.conv)
    y = dense(y, torch.channels_last if m.case.channels_last else torch.contiguous_format)
    branch, grad = Branch(y, m.stats(y)), m.grad(shape=tuple(y.shape))
    gates = [(unambiguous(grad, y, branch.stats, act), Gate("affine", None, act))]
    if is_gate(act):
        gates = [(grad, m.mask(y, act)), *gates]
    for g, gate in gates:
        for count in (y.numel() // y.shape[1], 0):
            yield PendingGrad(g, gate, branch, _sums(m, g, gate, (branch,)), count)


def _below(m: Builder, act: str) -> Branch:
    """The previous unit's raw output, moved off the places where its gate would be ambiguous."""
    raw = m.x()
    stats = m.stats(raw, "below")
    if m.case.exact:
        return Branch(raw, stats)
    ambiguous = unambiguous(torch.ones_like(raw), raw, stats, act) == 0
    clear = ((1 - stats[4]) / stats[3]).view(1, -1, 1, 1).to(raw.dtype)
    return Branch(raw.copy_(torch.where(ambiguous, clear, raw)), stats)


def _wishes(
    m: Builder, x: Tensor, prologue: Prologue, reduce: tuple[Gate, Branch]
) -> dict[str, dict[str, Any]]:
    """What the engine asks of a unit's backward, by name."""
    common: dict[str, Any] = {
        "prologue": None, "want_x": True, "want_weight": True, "accumulate": None, "reduce": None,
    }  # fmt: skip
    return {
        "first": common,
        "added": {**common, "accumulate": m.grad("other")},
        "gated": {**common, "accumulate": Gated(m.grad("other"), m.mask(x))},
        "inner": {**common, "prologue": prologue, "reduce": reduce},
        "kept": {**common, "reduce": reduce},
        "data only": {**common, "want_weight": False},
        "weight only": {**common, "want_x": False, "prologue": prologue},
    }


_CALLS: dict[str, Callable[[Builder], Iterator[Call]]] = {
    "channel_stats": _channel_stats,
    "finalize_stats": _finalize_stats,
    "scale_shift_act": _scale_shift_act,
    "bn_act_backward_reduce": _bn_act_backward_reduce,
    "bn_act_backward_apply": _bn_act_backward_apply,
    "bn_act_forward": _bn_act_forward,
    "bn_act_backward": _bn_act_backward,
    "add_act": _add_act,
    "act_backward": _act_backward,
    "scale_shift_act_pool": _scale_shift_act_pool,
    "max_pool_backward": _max_pool_backward,
    "conv_forward": _conv_forward,
    "conv_backward_data": _conv_backward_data,
    "conv_backward_weight": _conv_backward_weight,
    "conv_bn_act": _conv_bn_act,
    "conv_backward": _conv_backward,
    "update_running": _update_running,
}
