"""Modules whose forward was traced: a generated subclass of the user's class, and its plans."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastres.convert.compiled import FUNCTIONS, GUARDS, hold, publish
from fastres.convert.plan import Plan, make_plan
from fastres.convert.swaps import stands, stored
from fastres.convert.trace import NotTraced, Placeholder
from fastres.nn.fused import FusedParts
from fastres.nn.match import why_not_now

#: A module in one state is traced once. One that changes its state at every call is left to itself.
_MOST_TRACES = 64
#: States of a module that are kept side by side, as training and evaluation are.
_MOST_KEPT = 8


class Traced(nn.Module):
    """The first base of every generated class."""

    _fastres_stock: ClassVar[Any] = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the user's class does, which is what is stored: ours is made again when loaded."""
        return stored(self, super().__reduce_ex__(protocol), _restore)


def _restore(make: Callable[..., Any], *args: Any) -> Any:
    """A module as pickle and deepcopy make it, of its generated class."""
    module = make(*args)
    module.__class__ = traced_class(type(module))
    return module


def reverted(cls: Any, stocks: Mapping[type, type]) -> Any:
    """The class that a module's would be without ours among its bases.

    Args:
        cls: of a converted module, or what a wrapper as FSDP2 derived from one.
        stocks: fused class of a zoo's -> the zoo's.
    """
    if cls in stocks or stands(cls):
        return stocks.get(cls) or cls._fastres_stock
    bases = tuple([reverted(base, stocks) for base in cls.__bases__])
    if bases == cls.__bases__ or _calls_super(cls):
        return cls
    names = {n: v for n, v in cls.__dict__.items() if n not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, names)


def _calls_super(cls: type) -> bool:
    """Whether methods of a class name it itself: they would not take instances of another."""
    codes = [getattr(value, "__code__", None) for value in cls.__dict__.values()]
    return any([code is not None and "__class__" in code.co_freevars for code in codes])


_generated: WeakValueDictionary[type, type] = WeakValueDictionary()
_generating = threading.RLock()


def traced_class(stock: Any) -> Any:
    """The subclass of a module's class that runs its runs fused; one for each class."""
    with _generating:
        made = _generated.get(stock)
        if made is None:
            made = _generate(stock)
            _generated[stock] = made
    return made


def _generate(stock: Any) -> type:
    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            name = _for_compiler(self, args, kwargs)
            if name == "":
                return stock.forward(self, *args, **kwargs)
            tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
            return getattr(FUNCTIONS, name)(self, self, *tensors)
        out = _run(self, stock, args, kwargs)
        return stock.forward(self, *args, **kwargs) if out is _UNFUSED else out

    names = {"forward": forward, "_fastres_stock": stock, "__module__": stock.__module__}
    names |= {"__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock)(stock.__name__, (Traced, stock), names)


# ---------------------------------------------------------------- plans


class Bindings:
    """The plans of one module, by the kinds of its arguments."""

    def __init__(self) -> None:
        self.plans: dict[Any, list[Plan]] = {}
        self.failed: dict[Any, NotTraced] = {}
        self.traces = 0

    def plan(
        self, module: nn.Module, stock: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any
    ) -> Plan | None:
        """The plan for such arguments in the state in which everything is now."""
        plans = self.plans.setdefault(key, [])
        for i, plan in enumerate(plans):
            if plan.guard.holds(module):
                if i:
                    plans.insert(0, plans.pop(i))
                return plan
        if self.why_not(module, key) is not None or self.traces >= _MOST_TRACES:
            return None
        self.traces += 1
        args, kwargs = _stand_ins(args, kwargs)
        made = make_plan(module, stock.forward, args, kwargs, leaves_of(module), _is_traced)
        if isinstance(made, NotTraced):
            self.failed[_state(module, key)] = made
            return None
        plans.insert(0, made)
        del plans[_MOST_KEPT:]
        return made

    def why_not(self, module: nn.Module, key: Any) -> NotTraced | None:
        """Why there is no plan for such arguments, where that was found out."""
        return self.failed.get(_state(module, key))


def _state(module: nn.Module, key: Any) -> Any:
    return (key, module.training, *map(id, module._modules.values()))


_bindings: WeakKeyDictionary[nn.Module, Bindings] = WeakKeyDictionary()


def bindings_of(module: nn.Module) -> Bindings:
    """What is kept of a module."""
    kept = _bindings.get(module)
    if kept is None:
        kept = _bindings[module] = Bindings()
    return kept


def leaves_of(module: nn.Module) -> set[nn.Module]:
    """The children that run by themselves in whatever calls them: blocks, and what holds some."""
    apart: set[nn.Module] = set()
    for child in reversed([*module.modules()][1:]):
        if isinstance(child, FusedParts) or any([inner in apart for inner in child.children()]):
            apart.add(child)
        elif isinstance(child, Traced) and isinstance(plan := bound_plan(child), Plan):
            apart.update([child] if plan.holds_blocks else [])
    return apart


class _Kind(NamedTuple):
    """An argument that is not a tensor: its type and value."""

    type: type
    value: Any


#: Subclasses of Tensor may be told apart by a forward, and go their own ways.
_TENSORS = (Tensor, nn.Parameter)
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
_UNFUSED = object()


def _methods() -> list[Any]:
    """The methods of tensors that runs stand for."""
    return [
        Tensor.__add__, Tensor.__iadd__, Tensor.__radd__, Tensor.add, Tensor.add_, Tensor.relu,
        Tensor.relu_,
    ]  # fmt: skip


_WRITTEN = _methods()


def why_not_traced() -> str | None:
    """What keeps every traced module from being fused at the moment."""
    if _methods() != _WRITTEN:
        return "methods of torch.Tensor are not torch's own"
    return why_not_now()


def _run(module: Any, stock: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the forward returns, or _UNFUSED where the user's own has to run."""
    if why_not_traced() is not None or "_is_replica" in module.__dict__:
        return _UNFUSED
    tensors: Any = args
    key: Any = len(args)
    if kwargs or not all([type(arg) in _TENSORS for arg in args]):
        tensors, key = _signature(args, kwargs)
        if key is None:
            return _UNFUSED
    plan = bindings_of(module).plan(module, stock, args, kwargs, key)
    if plan is None or not plan.found.runs:
        return _UNFUSED
    return plan.function(module, module, *tensors)


def _for_compiler(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The name of the function that a compiler is to trace instead of the forward, or ""."""
    if not GUARDS or why_not_now() is not None or "_is_replica" in module.__dict__:
        return ""
    given = [None if isinstance(arg, Tensor) else arg for arg in args]
    names = tuple(kwargs)
    named = [None if isinstance(arg, Tensor) else arg for arg in kwargs.values()]
    tensors = [isinstance(arg, Tensor) for arg in (*args, *kwargs.values())]
    for kind in (*given, *named):
        if not isinstance(kind, (type(None), bool, int, float, str)):
            return ""
    return _function_name(module, tuple(given), names, tuple(named), tuple(tensors))


def _function_name(
    module: Any,
    args: tuple[Any, ...],
    names: tuple[str, ...],
    values: tuple[Any, ...],
    tensors: tuple[bool, ...],
) -> str:
    """The same, as the compiler asks once in a trace: it keeps the answer."""
    given = [_SOME if is_tensor else arg for arg, is_tensor in zip(args, tensors, strict=False)]
    named = zip(names, values, tensors[len(args) :], strict=True)
    kwargs = {name: _SOME if is_tensor else value for name, value, is_tensor in named}
    key: Any = len(args)
    if kwargs or not all(tensors):
        _, key = _signature(given, kwargs)
    stock = type(module)._fastres_stock
    plan = None
    if key is not None and why_not_traced() is None:
        plan = bindings_of(module).plan(module, stock, tuple(given), kwargs, key)
    if plan is None or not plan.found.runs:
        return ""
    holds = plan.guard.holds
    hold(module, lambda now: _methods() == _WRITTEN and holds(now))
    for run in plan.runs:
        run.prepare()
    return publish(module, plan.function)


# What torch.compiler.assume_constant_result does, without importing the compiler.
_function_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
#: Stands for any tensor among arguments.
_SOME = torch.empty(0)


def _signature(args: Any, kwargs: Any) -> tuple[list[Tensor], Any]:
    """The tensors among arguments, and what else there is; None for what is not known."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if type(leaf) in _TENSORS]
    others = [None if type(leaf) in _TENSORS else _Kind(type(leaf), leaf) for leaf in leaves]
    if not all([kind is None or kind.type in _CONSTANTS for kind in others]):
        return tensors, None
    return tensors, (spec, *others)


def _stand_ins(args: Any, kwargs: Any) -> tuple[Any, Any]:
    stand_in = Placeholder()
    return pytree.tree_map_only(Tensor, lambda _: stand_in, (args, kwargs))


def default_arguments(forward: Callable[..., Any]) -> tuple[Any, ...] | None:
    """Stand-ins for the tensors that a forward is called with, as far as its signature tells."""
    code: Any = getattr(forward, "__wrapped__", forward)
    code = getattr(code, "__code__", None)
    if code is None or code.co_kwonlyargcount:
        return None
    required = code.co_argcount - 1 - len(forward.__defaults__ or ())  # type: ignore[attr-defined]
    return tuple([Placeholder() for _ in range(required)])


def stock_of(module: nn.Module) -> Any:
    """The user's class of a module."""
    return getattr(type(module), "_fastres_stock", None) or type(module)


def _is_traced(module: nn.Module) -> bool:
    return isinstance(module, Traced)


def first_plan(
    module: nn.Module, leaves: Collection[nn.Module], able: Callable[[nn.Module], bool]
) -> Plan | NotTraced:
    """The plan for a call with nothing but tensors, of a module that is not converted.

    `leaves` and `able` as for `make_plan`.
    """
    forward = stock_of(module).forward
    args = default_arguments(forward)
    if not args:
        return NotTraced(module, "does not say what it is called with")
    return make_plan(module, forward, args, {}, leaves, able)


def bound_plan(module: nn.Module) -> Plan | NotTraced:
    """The same of a converted module, in the state in which it is."""
    stock = stock_of(module)
    if "forward" in module.__dict__:
        return NotTraced(module, "has its forward replaced")
    args = default_arguments(stock.forward) or ()
    bindings = bindings_of(module)
    plan = bindings.plan(module, stock, args, {}, len(args))
    if plan is not None:
        return plan
    return bindings.why_not(module, len(args)) or NotTraced(module, "changes at every call")


def bind(module: nn.Module, plan: Plan) -> None:
    """Keep a module's first plan, and give it the class that runs it."""
    bindings = Bindings()
    bindings.plans[len(default_arguments(type(module).forward) or ())] = [plan]
    bindings.traces = 1
    module.__class__ = traced_class(type(module))
    _bindings[module] = bindings
