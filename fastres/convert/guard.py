"""Whether what a trace was read off is still what would run.

A forward is Python: it reads attributes, names of its file and of torch, variables of functions
around it, and it calls methods and children. All that was there in the trace is compared by
identity, plain values by value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from fastres.convert.trace import Code, Trace

_MISSING = object()


class UnknownError(Exception):
    """What a trace depended on cannot be found again."""


class Guard:
    """What one trace of a module depended on."""

    __slots__ = ("_cells", "_classes", "_copies", "_inside", "_leaves", "_names")

    def __init__(self, root: nn.Module, traced: Trace, leaves: Iterable[nn.Module]) -> None:
        names = sorted({name for code in traced.code for name in code.code.co_names})
        dynamic = bool({"getattr", "__dict__", "vars"} & {*names})
        self._copies: list[tuple[Any, Any]] = []
        self._inside = [
            self._look(root, module, _read(module, names, dynamic)) for module in traced.inside
        ]
        self._leaves = [
            (leaf, type(leaf), _hooked(leaf.__dict__)) for leaf in dict.fromkeys(leaves)
        ]
        self._names: list[tuple[dict[str, Any], list[str], list[Any]]] = []
        self._classes: dict[type, dict[str, Any]] = {}
        for module in traced.inside:
            self._add_classes(type(module).__mro__)
        seen: dict[tuple[int, str], None] = {}
        for code in traced.code:
            self._add_names(code.globals, sorted({*code.code.co_names}), seen)
        self._cells = [*_cells(traced)]
        for _, value in self._cells:
            self._watch(value)

    def settle(self) -> None:
        """Take children as converted that were not yet when the trace was made."""
        self._leaves = [(leaf, type(leaf), hooked) for leaf, _, hooked in self._leaves]

    def holds(self, root: nn.Module) -> bool:
        """Whether tracing the module again would give the same."""
        try:
            return self._same_modules(root) and self._same_names()
        except Exception:  # A value that cannot be compared may have changed.
            return False

    def _same_modules(self, root: nn.Module) -> bool:
        for module, cls, names, values, children, absent, table in self._inside:
            if module is None:
                module = root
            elif type(module) is not cls or _hooked(module.__dict__):
                return False
            now = module.__dict__
            if now["_parameters"] is not table:
                return False
            if [now.get(name, _MISSING) for name in names] != values:
                return False
            if [*now["_modules"].items()] != children or _absent(now) != absent:
                return False
        return all(
            [
                type(leaf) is cls and _hooked(leaf.__dict__) is hooked
                for leaf, cls, hooked in self._leaves
            ]
        )

    def _same_names(self) -> bool:
        for names, known, values in self._names:
            if [names.get(name, _MISSING) for name in known] != values:
                return False
        for cls, attributes in self._classes.items():
            if cls.__dict__ != attributes:
                return False
        for cell, value in self._cells:
            if cell.cell_contents is not value:
                return False
        return all([now == before for now, before in self._copies])

    def _look(self, root: nn.Module, module: nn.Module, names: list[str]) -> tuple[Any, ...]:
        now = module.__dict__
        values = [now.get(name, _MISSING) for name in names]
        for value in values:
            self._watch(value)
        # The module itself is looked at when it is called: kept here it would never be freed.
        kept = None if module is root else module
        children = [*now["_modules"].items()]
        return kept, type(module), names, values, children, _absent(now), now["_parameters"]

    def _watch(self, value: Any) -> None:
        """A value that may change and stay the same object is compared with a copy."""
        if isinstance(value, (list, dict, set)):
            self._copies.append((value, _copied(value)))
        elif not isinstance(value, _OPAQUE) and isinstance(getattr(value, "__dict__", 0), dict):
            self._copies.append((value.__dict__, dict(value.__dict__)))
            self._add_classes(type(value).__mro__)

    def _add_classes(self, classes: Iterable[type]) -> None:
        for cls in classes:
            home = cls.__module__.partition(".")[0]
            if home in ("torch", "builtins", "fastres") or cls in self._classes:
                continue
            self._classes[cls] = dict(cls.__dict__)
            for value in cls.__dict__.values():
                if isinstance(value, (list, dict, set)):
                    self._watch(value)

    def _add_names(
        self, table: dict[str, Any], names: list[str], seen: dict[tuple[int, str], None]
    ) -> None:
        known = [name for name in names if name in table and (id(table), name) not in seen]
        seen.update({(id(table), name): None for name in known})
        if known:
            self._names.append((table, known, [table[name] for name in known]))
        for value in [table[name] for name in known]:
            if isinstance(value, ModuleType):
                self._add_names(value.__dict__, names, seen)
            elif isinstance(value, type):
                self._add_classes(value.__mro__)
            else:
                self._watch(value)


def _copied(value: Any, depth: int = 2) -> Any:
    """A container, and those in it, as they are now."""
    if isinstance(value, dict) and depth:
        return {key: _copied(one, depth - 1) for key, one in value.items()}
    if isinstance(value, list) and depth:
        return [_copied(one, depth - 1) for one in value]
    return value.copy() if isinstance(value, (list, dict, set)) else value


#: Values that are compared by identity alone.
_OPAQUE = (nn.Module, Tensor, type, ModuleType, FunctionType, CodeType)


def _read(module: nn.Module, names: list[str], dynamic: bool) -> list[str]:
    """The attributes that code with such names may read of a module, be they there or not."""
    plain = [name for name in module.__dict__ if name not in _TABLES]
    return sorted({*names, "training", *(plain if dynamic else ())} - _TABLES)


_TABLES = {
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks",
    "_backward_hooks", "_backward_pre_hooks",
}  # fmt: skip


def _absent(now: dict[str, Any]) -> list[tuple[str, bool]]:
    """Which parameters and buffers there are, and which of them are None."""
    return [
        (n, t is None) for table in (now["_parameters"], now["_buffers"]) for n, t in table.items()
    ]


def _hooked(now: dict[str, Any]) -> bool:
    return bool(
        now["_forward_hooks"]
        or now["_forward_pre_hooks"]
        or now["_backward_hooks"]
        or now["_backward_pre_hooks"]
        or "forward" in now
    )


# ---------------------------------------------------------------- variables of functions around


def _cells(traced: Trace) -> Iterator[tuple[CellType, Any]]:
    """The variables that the code of a trace reads of functions around it."""
    codes = [code for code in traced.code if {*code.code.co_freevars} - {"__class__"}]
    within = {const for code in traced.code for const in code.code.co_consts}
    functions = {function.__code__: function for function in _functions(traced)}
    for code in codes:
        if code.code in within:  # They are variables of code that is looked at itself.
            continue
        if code.code not in functions:
            raise UnknownError(f"{code.code.co_name} reads variables of a function around it")
        for name, cell in zip(
            code.code.co_freevars, functions[code.code].__closure__ or (), strict=True
        ):
            if name != "__class__":
                yield cell, cell.cell_contents


def _functions(traced: Trace) -> Iterator[FunctionType]:
    """Functions that the code of a trace can reach: methods, attributes, names of its files."""
    tables: list[dict[str, Any]] = [module.__dict__ for module in traced.inside]
    tables += [dict(cls.__dict__) for m in traced.inside for cls in type(m).__mro__]
    tables += _globals(traced.code)
    waiting = [value for table in tables for value in table.values()]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if not isinstance(value, FunctionType) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        waiting += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _globals(code: Iterable[Code]) -> list[dict[str, Any]]:
    found = []
    for one in code:
        found.append({n: one.globals[n] for n in one.code.co_names if n in one.globals})
    return found
