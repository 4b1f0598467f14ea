"""What a module was found to compute, kept while nothing it was read from has changed.

Children are swapped, hooked, frozen, patched and moved during a model's life. So each call looks at
all of them: at every child's own attributes by value, at parameters and buffers by identity, and
at shapes, dtypes, devices and strides. What is spared is to work out again what follows from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastres.block import current
from fastres.block.call import Call, autocasts, prepare
from fastres.block.plan import switches
from fastres.kernels import registrations
from fastres.nn.frozen import frozen_of_class
from fastres.nn.match import Decline, Match, Parts, Projection, match

#: A module, its class, its attributes, and the identities of its parameters, buffers and children.
_Seen = tuple[nn.Module, Any, dict[str, Any], list[int]]

#: Inputs of a module are of few kinds; one that sees ever new ones starts over now and then.
_MOST_KEPT = 64

_forward_of, _wants = attrgetter("forward"), attrgetter("requires_grad")


class Bound:
    """A match, and the calls that were prepared for it."""

    __slots__ = ("_block", "_calls", "_forwards", "_frozen", "_seen", "match")

    def __init__(self, module: nn.Module, parts: Parts, matched: Match) -> None:
        self.match = matched
        self._seen = [_look(one) for one in _modules(parts)]
        # The module itself is looked at when it is called: kept here it would never be freed.
        self._block = _look(module)[1:]
        classes = dict.fromkeys([cls for _, cls, *_ in self._seen])
        frozen = {cls: frozen_of_class(cls) for cls in classes}
        self._frozen = [cls for cls, known in frozen.items() if known is not None]
        self._forwards = [known.forward for known in frozen.values() if known is not None]
        self._calls: dict[Any, Call | None] = {}

    def holds(self, module: nn.Module) -> bool:
        """Whether everything is still as it was when the match was made."""
        try:
            for child, cls, attributes, identities in ((module, *self._block), *self._seen):
                now = child.__dict__
                tensors = [*now["_parameters"].values(), *now["_buffers"].values()]
                tensors += now["_modules"].values()
                if type(child) is not cls or now != attributes or [*map(id, tensors)] != identities:
                    return False
                # The module's own hooks run around its forward, as ever.
                if child is not module and (
                    now["_forward_hooks"]
                    or now["_forward_pre_hooks"]
                    or now["_backward_hooks"]
                    or now["_backward_pre_hooks"]
                ):
                    return False
            return [*map(_forward_of, self._frozen)] == self._forwards
        except Exception:  # An attribute that cannot be compared may have changed.
            return False

    def call(self, x: Tensor, residual: Tensor | None = None) -> Call | None:
        """How to run the match on x and what is added, or None where it cannot be fused."""
        layers = self.match.layers
        tensors = [x, *[t for layer in layers for t in layer[1:7] if t is not None]]
        if residual is not None:
            tensors.append(residual)
        key = (
            (*map(_wants, tensors),) if torch.is_grad_enabled() else (),
            current(), switches(x.device.type), registrations(),
            *[(t.shape, t.stride(), t.dtype, t.device, type(t)) for t in tensors],
        )  # fmt: skip
        try:
            return self._calls[key]
        except KeyError:
            call = prepare(x, self.match.block, layers, residual)
            call = None if call is None else call.with_programs(x.device)
        if x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            if len(self._calls) >= _MOST_KEPT:
                self._calls.clear()
            self._calls[key] = call
        return call


_bound: WeakKeyDictionary[nn.Module, Bound] = WeakKeyDictionary()


def bound_of(module: nn.Module, parts: Parts | Decline | None = None) -> Bound | None:
    """The bound match of a module; None where there is none that holds, and `parts` give none."""
    if parts is None:
        bound = _bound.get(module)
        return bound if bound is not None and bound.holds(module) else None
    matched = match(parts)
    if isinstance(parts, Decline) or isinstance(matched, Decline):
        return None
    bound = Bound(module, parts, matched)
    # Tensors that were computed, as torch.func.functional_call puts in, are not held on to.
    if all([t is None or t.is_leaf for layer in matched.layers for t in layer.parameters]):
        _bound[module] = bound
    return bound


def simple(x: Tensor) -> bool:
    """Whether x is a plain tensor at a moment at which nothing rewrites what is done to it.

    Then what was prepared for one that is alike can be run as it is.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and not autocasts(x.device.type)
    )


def _look(module: nn.Module) -> _Seen:
    return module, type(module), dict(module.__dict__), _identities(module.__dict__)


def _identities(attributes: dict[str, Any]) -> list[int]:
    tables = (attributes["_parameters"], attributes["_buffers"], attributes["_modules"])
    return [id(one) for table in tables for one in table.values()]


def _modules(parts: Parts) -> Iterator[nn.Module]:
    """The modules that a match of `parts` read."""
    for steps in parts.units:
        yield from (m for child in steps if child is not None for m in child.modules())
    projection = parts.projection
    if isinstance(projection, Projection):
        yield from (m for m in projection if m is not None)
    elif projection is not None:
        yield from projection.modules()
    others = (parts.end, parts.gate, *parts.identities, *parts.wrappers)
    yield from (m for m in others if m is not None)
