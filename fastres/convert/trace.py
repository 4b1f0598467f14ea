"""A module's own forward, traced symbolically: the graph of what it computes, or why there is none.

torch.fx runs the forward once on stand-ins for its tensors. A graph stands for the forward only if
running it again would do the same. So everything that the user's code calls meanwhile is looked at:
what draws numbers, keeps values, prints, sets attributes or switches modes is not traced through.
"""

from __future__ import annotations

import dis
import gc
import operator
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastres.nn import factors
from fastres.nn.fused import FusedParts
from fastres.nn.match import hooked, is_norm


class RefusedError(Exception):
    """Why a forward is not traced, to follow the name of its module."""


class Code(NamedTuple):
    """User code that ran in a trace: what it calls things, and where it finds them."""

    code: CodeType
    globals: dict[str, Any]


class Trace(NamedTuple):
    """What a forward was found to compute.

    Attributes:
        graph: of torch.fx; its placeholders are the tensors among the arguments, in their order.
        inside: the module itself and the children that were looked into.
        code: the user's functions that ran.
    """

    graph: fx.Graph
    inside: tuple[nn.Module, ...]
    code: tuple[Code, ...]


class NotTraced(NamedTuple):
    """Why a module's forward has no trace."""

    module: nn.Module
    text: str


#: torch.fx patches nn.Module while it traces: one trace at a time. Other threads are let through.
_tracing = threading.RLock()


def trace(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: Collection[nn.Module],
    wants_grad: bool | None = None,
) -> Trace | NotTraced:
    """Trace `forward(module, *args, **kwargs)`.

    Args:
        module: nothing about it is changed.
        forward: its class's own.
        args: what it is called with; a `Placeholder` stands for each tensor.
        kwargs: likewise.
        leaves: children that are not looked into, besides those that never are.
        wants_grad: what the inputs' `requires_grad` is taken to be; None leaves it open.
    """
    opaque = set(leaves)
    while True:
        with _tracing:
            tracer = _Tracer(opaque, forward, args, kwargs)
            tracer.wants_grad = wants_grad
            failed = tracer.run(module)
            changed = tracer.watch.kept.restore()
        if failed is None and changed:
            owner = changed[0] if isinstance(changed[0], nn.Module) else module
            failed = NotTraced(owner, "changes a list or dictionary that it does not make")
        if failed is None:
            return Trace(tracer.graph, tuple(tracer.inside), tuple(tracer.watch.code.values()))
        if failed.module is module or failed.module in opaque:
            return NotTraced(module, failed.text)
        opaque.add(failed.module)


class Placeholder:
    """Stands for a tensor among arguments."""


def never_inside(module: nn.Module) -> bool:
    """Whether a child is a step of its own in every trace, and not looked into."""
    home = type(module).__module__.split(".")
    if home[0] == "fastres" or isinstance(module, (FusedParts, torch.jit.ScriptModule)):
        return True
    if home[:2] in (["torch", "nn"], ["torch", "ao"]) and not isinstance(module, nn.Sequential):
        return True
    known = factors.drop_of(module) or factors.gate_of(module) or is_norm(module)
    return bool(known) or hooked(module) is not None or "parametrizations" in module._modules


class _Value(fx.Proxy):
    """A value in a trace. User code that asks for its type is told the truth, or refused."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if _is_trusted(sys._getframe(1).f_globals):
            return _Value
        if self.node.op == "placeholder":
            return Tensor
        raise RefusedError("asks for the type of a value")

    @property
    def requires_grad(self) -> Any:
        """As was to be assumed of inputs; of any other value it stays open."""
        assumed = self.tracer.wants_grad  # type: ignore[attr-defined]
        if assumed is None or self.node.op != "placeholder":
            return fx.proxy.Attribute(self, "requires_grad")
        return assumed


def _in_place(name: str) -> Any:
    function = getattr(operator, name)

    def method(self: _Value, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


# torch.fx takes `x += y` for `x = x + y`.
for _name in (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
    "ilshift", "irshift", "imatmul",
):  # fmt: skip
    setattr(_Value, f"__{_name}__", _in_place(f"__{_name}__"))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True
    wants_grad: bool | None = None

    def __init__(
        self,
        opaque: Collection[nn.Module],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.watch = _Watch()
        self.inside: list[nn.Module] = []
        self._opaque, self._function = opaque, function
        self._given = (args, kwargs)
        self._entered: list[nn.Module] = []
        self._thread = threading.get_ident()

    def run(self, module: nn.Module) -> NotTraced | None:
        """Trace; what went wrong, and in which of the modules that were looked into."""
        self._entered = [module]
        self.inside = [module]
        self.watch.kept.add_modules(module)
        try:
            with _no_collection(), self.watch, _RealTensors():
                self.trace(module)
        except Exception as error:
            return NotTraced(self._entered[-1], _words(self.watch.problem or error))
        problem = self.watch.problem
        return None if problem is None else NotTraced(module, _words(problem))

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        leaves, spec = pytree.tree_flatten(self._given)
        given: list[Any] = []
        for leaf in leaves:
            tensor = isinstance(leaf, Placeholder)
            name = f"input_{len(given)}"
            given.append(self.create_proxy("placeholder", name, (), {}) if tensor else leaf)
        args, kwargs = pytree.tree_unflatten(given, spec)
        return lambda: self._function(self.root, *args, **kwargs), []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._opaque or never_inside(m)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:
            raise RefusedError(
                f"calls a {type(m).__name__} that is not among its children"
            ) from None
        if _calls_its_own_way(m):
            raise RefusedError(f"calls a {type(m).__name__}, which has a __call__ of its own")
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self._entered.append(m)
        if all([m is not other for other in self.inside]):
            self.inside.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self._entered.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, (Tensor, nn.Module)):
            raise RefusedError(f"computes with a {type(a).__name__} that it does not register")
        if type(a) is OrderedDict:
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        if isinstance(a, (tuple, list, dict)) and type(a) not in (tuple, list, dict):
            raise RefusedError(f"makes a {type(a).__name__}")
        return super().create_arg(a)


def _calls_its_own_way(module: nn.Module) -> bool:
    """Whether calling a module may do more than torch's nn.Module.__call__."""
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return False
        own = cls.__dict__.get("__call__")
        if own is not None and not str(getattr(own, "__module__", "")).startswith("torch."):
            return True
    return False


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector, which would call anybody's finalizers."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _words(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    if isinstance(error, RefusedError):
        return text
    if "control flow" in text:
        return "has control flow that depends on values"
    return f"cannot be traced: {text or type(error).__name__}"


class _RealTensors(TorchFunctionMode):
    """Refuses what a forward does with tensors of its own: their values would be kept for good."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any([isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))]):
            name = getattr(func, "__name__", str(func))
            raise RefusedError(f"calls torch's {name} on no input of its own")
        return func(*args, **kwargs)


# ---------------------------------------------------------------- what user code calls

#: Code whose calls are not looked at: torch's, ours, and what Python is made of.
_TRUSTED = {
    "torch", "fastres", "abc", "_abc", "typing", "collections", "enum", "functools", "operator",
    "_collections_abc", "types", "weakref", "_weakrefset",
}  # fmt: skip
#: What user code may call of torch's Python: these do nothing but compute.
_COMPUTING = (
    "torch.nn.modules.", "torch.nn.functional", "torch.functional", "torch._jit_internal",
    "torch.fx.", "torch.overrides", "torch.jit._trace", "torch.compiler", "torch._VF",
    "fastres.convert.",
)  # fmt: skip
_BUILTINS = {
    "abs", "all", "any", "callable", "divmod", "getattr", "hasattr", "isinstance", "issubclass",
    "iter", "len", "max", "min", "next", "pow", "repr", "round", "sorted", "sum",
}  # fmt: skip
#: Modules of Python and torch whose functions depend on nothing but their arguments.
_PURE_MODULES = {"math", "_operator", "_functools", "_collections", "torch._C._nn"}
_PLAIN = (str, bytes, int, float, complex, list, tuple, dict, set, frozenset, slice, range)
#: Modules that user code may mention. Others may give another value each time.
_MENTIONED = {"torch", "math", "operator", "functools", "itertools", "collections", "typing"}
_CHANGING = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"}
_ASKING = {"type", "globals", "locals", "vars", "exec", "eval"}


def _is_trusted(names: dict[str, Any]) -> bool:
    return str(names.get("__name__")).partition(".")[0] in _TRUSTED


class _Watch:
    """Looks at every call that user code makes, by Python's profiler."""

    def __init__(self) -> None:
        self.code: dict[CodeType, Code] = {}
        self.problem: RefusedError | None = None
        self.kept = _Kept()
        #: Functions of Python's own library that trusted code has called.
        self._through: set[FrameType] = set()
        self._before: Any = None

    def __enter__(self) -> _Watch:
        self._before = sys.getprofile()
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _look(self, frame: FrameType, event: str, arg: Any) -> None:
        if self.problem is not None:
            return
        text = None
        if event == "call":
            text = self._enter(frame)
        elif event == "return":
            self._through.discard(frame)
        elif event == "c_call" and not self._trusts(frame):
            text = None if _computes(arg) else f"calls {getattr(arg, '__qualname__', arg)}"
        if text is not None:
            self.problem = RefusedError(text)
            raise self.problem

    def _trusts(self, frame: FrameType) -> bool:
        return frame in self._through or _is_trusted(frame.f_globals)

    def _enter(self, frame: FrameType) -> str | None:
        names, code, caller = frame.f_globals, frame.f_code, frame.f_back
        by_trusted = caller is None or self._trusts(caller)
        home = str(names.get("__name__"))
        if by_trusted and (_is_of_python(home) or code.co_filename == "<string>"):
            self._through.add(frame)
            return None
        if not _is_trusted(names):
            if code not in self.code:
                self.code[code] = Code(code, names)
                for name in code.co_names:
                    self.kept.add(None, names.get(name))
            return _why_not_code(code) or _why_not_names(code, names)
        if by_trusted or _is_private(code) or code is torch._assert.__code__:
            return None
        if home.startswith(_COMPUTING) or home.partition(".")[0] not in ("torch", "fastres"):
            return None
        return f"calls {home}.{code.co_name}"


def _is_of_python(home: str) -> bool:
    return home.partition(".")[0] in sys.stdlib_module_names and home != "__main__"


def _is_private(code: CodeType) -> bool:
    return code.co_name in ("_look", "__exit__") and code.co_filename == __file__


def _computes(function: Any) -> bool:
    """Whether a function in C gives the same for the same arguments, and does nothing else."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, ModuleType):
        if owner.__name__ == "builtins":
            return function.__name__ in _BUILTINS
        return owner.__name__ in _PURE_MODULES
    if owner is None:
        return getattr(torch._C._VariableFunctions, function.__name__, None) is function
    if isinstance(owner, type):
        return issubclass(owner, (*_PLAIN, Tensor))
    # What is done to tensors themselves is another's to look at.
    return isinstance(owner, (*_PLAIN, Tensor, fx.Proxy)) or type(owner).__module__ == "builtins"


@lru_cache(maxsize=1024)
def _why_not_code(code: CodeType) -> str | None:
    """What a function does that a graph would not, as far as its instructions tell."""
    for instruction in dis.get_instructions(code):
        outer = instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars
        if instruction.opname in _CHANGING or outer:
            return f"sets {instruction.argval}"
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval in _ASKING:
            return f"calls {instruction.argval}"
        if instruction.opname in ("IMPORT_NAME", "YIELD_VALUE") and code.co_name == "forward":
            return "imports or yields"
    return None


def _why_not_names(code: CodeType, names: dict[str, Any]) -> str | None:
    for name in code.co_names:
        value = names.get(name)
        if isinstance(value, ModuleType) and _is_impure(value, names):
            return f"uses the module {value.__name__}"
    return None


def _is_impure(module: ModuleType, names: dict[str, Any]) -> bool:
    top = module.__name__.partition(".")[0]
    return top not in _MENTIONED and top != str(names.get("__name__")).partition(".")[0]


# ---------------------------------------------------------------- what modules keep


class _Kept:
    """Lists, dictionaries and sets that were there before a trace, and are to stay as they were."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Any, Any, Any]] = {}

    def add(self, owner: Any, value: Any, depth: int = 2) -> None:
        """Keep a container, and those in it, on behalf of what has it."""
        if not isinstance(value, (list, dict, set)) or id(value) in self._before:
            return
        self._before[id(value)] = (owner, value, value.copy())
        inner = value.values() if isinstance(value, dict) else value
        for one in inner if depth else ():
            self.add(owner, one, depth - 1)

    def add_modules(self, root: nn.Module) -> None:
        """Keep what modules and their classes have as attributes."""
        seen: set[type] = set()
        for module in root.modules():
            classes = [cls for cls in type(module).__mro__ if cls not in seen]
            seen.update(classes)
            for table in (module.__dict__, *[cls.__dict__ for cls in classes]):
                for name, value in table.items():
                    if name not in _TABLES:
                        self.add(module, value)

    def restore(self) -> list[Any]:
        """The owners of what was changed, which is undone."""
        changed = []
        for owner, value, before in self._before.values():
            if len(value) != len(before) or not _alike(value, before):
                _restore(value, before)
                changed.append(owner)
        return changed


_TABLES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def _alike(value: Any, before: Any) -> bool:
    if isinstance(value, dict):
        return all([key in before and before[key] is value[key] for key in value])
    if isinstance(value, list):
        return all([a is b for a, b in zip(value, before, strict=True)])
    return value == before


def _restore(value: Any, before: Any) -> None:
    value.clear()
    if isinstance(value, list):
        value.extend(before)
    else:
        value.update(before)
