"""What a module was found to compute, kept while nothing it was read from has changed.

Children are swapped, hooked, frozen, patched and moved during a model's life. So each call looks at
all of them: at every child's own attributes by value, at parameters and buffers by identity, and
at shapes, dtypes, devices and strides. What is spared is to work out again what follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastres.block import Layer, current
from fastres.block.call import Call, autocast, execute, prepare
from fastres.block.plan import switches
from fastres.kernels import registrations
from fastres.kernels.cpu.module import module as compiled
from fastres.kernels.cpu.module import why_not_built
from fastres.nn.frozen import frozen_of_class
from fastres.nn.match import Decline, Match, Parts, Projection, first_hooked, match

#: Inputs of a module are of few kinds; one that sees ever new ones starts over now and then.
_MOST_KEPT = 64

_forward_of, _wants = attrgetter("forward"), attrgetter("requires_grad")
_attributes_of = attrgetter("__dict__")
_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _same_items(dicts: Sequence[dict[str, Any]], copies: Sequence[dict[str, Any]]) -> bool:
    """Whether each dictionary has the keys of its copy, in their order, and the same values."""
    return all(
        [
            [*one] == [*other] and all(map(is_, one.values(), other.values()))
            for one, other in zip(dicts, copies, strict=True)
        ]
    )


same_items = _same_items if why_not_built() is not None else compiled().same_items


#: Whether tensors are like those that a call was prepared for, and the call.
_Known = tuple[Callable[..., bool], Call | None]


class Bound:
    """A match, and the calls that were prepared for it."""

    __slots__ = (
        "_calls", "_children", "_classes", "_copies", "_forwards", "_frozen", "_hooks", "_latest",
        "_tables", "match",
    )  # fmt: skip

    def __init__(self, module: nn.Module, parts: Parts, matched: Match) -> None:
        self.match = matched
        # The module itself is given at each call: kept here it would never be freed.
        self._children = [*_modules(parts)]
        modules = [module, *self._children]
        self._classes = [*map(type, modules)]
        attributes = [*map(_attributes_of, modules)]
        self._tables = [one[name] for one in attributes for name in _TABLES]
        self._copies = [*map(dict, chain(attributes, self._tables))]
        # The module's own hooks run around its forward, as ever.
        self._hooks = [one[name] for one in attributes[1:] for name in _HOOKS]
        frozen = {cls: frozen_of_class(cls) for cls in dict.fromkeys(self._classes[1:])}
        self._frozen = [cls for cls, known in frozen.items() if known is not None]
        self._forwards = [known.forward for known in frozen.values() if known is not None]
        self._calls: dict[Any, _Known] = {}
        self._latest: dict[Any, _Known] = {}

    def holds(self, module: nn.Module) -> bool:
        """Whether everything is still as it was when the match was made.

        Tables of parameters, buffers, children and hooks are attributes: they are the same ones as
        long as these are.
        """
        modules = [module, *self._children]
        return (
            [*map(type, modules)] == self._classes
            and same_items([*map(_attributes_of, modules), *self._tables], self._copies)
            and not any(self._hooks)
            and [*map(_forward_of, self._frozen)] == self._forwards
        )

    @property
    def calls(self) -> list[Call | None]:
        """What was prepared so far; None for inputs that cannot be fused."""
        return [call for _, call in self._calls.values()]

    def run_autocast(self, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
        """The match's value under autocast, or None where it cannot be fused.

        Convolutions are given tensors of its dtype, made anew at each call.
        """
        x, layers = autocast(x, self.match.layers)
        call = self.call(x, residual, layers)
        return None if call is None else execute(call.on(layers), x, residual)

    def call(
        self, x: Tensor, residual: Tensor | None = None, layers: Sequence[Layer] | None = None
    ) -> Call | None:
        """How to run the match on x and what is added, or None where it cannot be fused.

        With `layers` in the place of the match's own it comes without their tensors.
        """
        own = self.match.layers
        layers = own if layers is None else layers
        tensors = [x, *[t for layer in layers for t in layer[1:7] if t is not None]]
        if residual is not None:
            tensors.append(residual)
        settings = (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), current(),
            switches(x.device.type), registrations(), layers is own,
        )  # fmt: skip
        latest = self._latest.get(settings)
        if latest is not None and latest[0](*tensors):
            return latest[1]
        key = (
            (*map(_wants, tensors),) if torch.is_grad_enabled() else (), settings,
            *[(t.shape, t.stride(), t.dtype, t.device, type(t)) for t in tensors],
        )  # fmt: skip
        known = self._calls.get(key)
        if known is None:
            call = prepare(x, self.match.block, layers, residual)
            call = None if call is None else call.with_programs(x.device)
            if call is not None and layers is not own:
                call = call.without_tensors(own)
            if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return call
            if len(self._calls) >= _MOST_KEPT:
                self._calls.clear()
                self._latest.clear()
            known = self._calls[key] = _alike(tensors), call
        self._latest[settings] = known
        return known[1]


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
    # Tensors that were computed, as torch.func.functional_call puts in, are not held on to, nor is
    # what hooks that may go again have led to.
    leaves = all([t is None or t.is_leaf for layer in matched.layers for t in layer.parameters])
    if leaves and first_hooked(parts.watched) is None:
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
    )


def _never(*tensors: Tensor) -> bool:
    """Nothing says that tensors are alike."""
    return False


def _alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether tensors are like these in type, shape, strides, dtype, device, and in whether they
    want a gradient: torch.compile's own guard, which asks that of all in one call. In a torch that
    has it no more, and of a tensor that is there twice, it never is.
    """
    try:
        guards = torch._C._dynamo.guards.TensorGuards(
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        )
        check: Callable[..., bool] = guards.check
        return check if check(*tensors) else _never
    except Exception:
        return _never


def _modules(parts: Parts) -> Iterator[nn.Module]:
    """The modules that a match of `parts` read."""
    for steps in parts.units:
        yield from (m for child in steps if child is not None for m in child.modules())
    projection = parts.projection
    if isinstance(projection, Projection):
        yield from (m for m in projection if m is not None)
    elif projection is not None:
        yield from projection.modules()
    others = (
        parts.end, parts.gate, parts.max_pool, *parts.identities, *parts.wrappers, *parts.watched,
    )  # fmt: skip
    yield from (m for m in others if m is not None)
