"""Finds out which classes are frozen batch norms, by what their forward does.

The forward is traced, and its graph executed on random stand-ins for the module's tensors: it must
give what the formula gives, for every shape and, where it asks whether x wants a gradient, for
both answers.
"""

from __future__ import annotations

import copy
import operator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastres.convert.trace import NotTraced, Placeholder, Trace, trace
from fastres.nn.frozen import TENSORS, Frozen, has_tensors, register_frozen

#: Forwards that were looked into: they are what they are found to be, or no frozen norm.
_seen: set[tuple[type, Any]] = set()

#: An eps that nobody else has, to tell the module's attribute from a number in the code.
_TELLING = 0.2345


#: What such a forward is made of: functions that agree at random points are then the same.
_FUNCTIONS: set[Any] = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
    operator.getitem, torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.pow, torch.rsqrt,
    torch.sqrt, torch.reciprocal, torch.reshape, torch.unsqueeze, F.batch_norm,
}  # fmt: skip
_METHODS = {
    "reshape", "view", "unsqueeze", "to", "type_as", "add", "sub", "mul", "div", "neg", "pow",
    "rsqrt", "sqrt", "reciprocal",
}  # fmt: skip


def learn(model: nn.Module) -> None:
    """Look into the forwards of a model's modules that have the tensors of a frozen norm."""
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._NormBase, torch.jit.ScriptModule)):
            continue
        cls: Any = type(module)
        if not has_tensors(module):
            continue
        if cls.__module__.split(".")[0] in ("torch", "fastres") or "forward" in module.__dict__:
            continue
        if (cls, cls.forward) in _seen:
            continue
        _seen.add((cls, cls.forward))
        try:
            found = _frozen(module)
        except Exception:  # Anybody's code is executed: then it is no formula that we know.
            continue
        if found is not None:
            register_frozen(cls, found)


def _frozen(module: Any) -> Frozen | None:
    own_eps = "eps" in module.__dict__
    stand_in = copy.copy(module)
    if own_eps:
        stand_in.__dict__["eps"] = _TELLING
    graphs: dict[fx.Graph, tuple[str, ...]] = {}
    for wants_grad in (False, True):
        traced = _traced(stand_in, wants_grad)
        if traced is None or not _reads_nothing_else(module, traced):
            return None
        if (parted := _parted(traced.graph)) is None:
            return None
        graphs[parted[0]] = parted[1]
    if len({*graphs.values()}) != 1:
        return None
    eps = _TELLING if own_eps and "eps" in type(module).forward.__code__.co_names else None
    number = _constant(next(iter(graphs))) if eps is None else eps
    for shape in ((2, 5, 3, 4), (1, 1, 1, 1), (3, 2, 1, 5)):
        if not all([_is_formula(graph, shape, number) for graph in graphs]):
            return None
    promotes = not all([_keeps_dtype(graph) for graph in graphs])
    behind = next(iter(graphs.values()))
    return Frozen(type(module).forward, None if eps is not None else number, behind, promotes)


def _traced(module: nn.Module, wants_grad: bool) -> Trace | None:
    forward = type(module).forward
    leaves = [*module.modules()][1:]
    traced = trace(module, forward, (Placeholder(),), {}, leaves, wants_grad=wants_grad)
    if isinstance(traced, NotTraced) or len(traced.code) != 1:
        return None
    return traced if traced.code[0].code is getattr(forward, "__code__", None) else None


def _reads_nothing_else(module: nn.Module, traced: Trace) -> bool:
    """Whether what a forward computes follows from its code, the tensors and `eps` alone."""
    (code,) = traced.code
    names = {*code.code.co_names}
    if code.code.co_freevars or names & {"getattr", "__dict__", "training", "__class__"}:
        return False
    attributes = {name for name in module.__dict__ if name not in ("_parameters", "_buffers")}
    if names & attributes - {"eps"}:
        return False
    names |= {"__call__", "__getattr__", "__getattribute__"}
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] not in ("torch", "builtins") and names & {*cls.__dict__}:
            return False
    values = [code.globals[name] for name in names if name in code.globals]
    return all([_is_of_torch(value) for value in values])


def _is_of_torch(value: Any) -> bool:
    if isinstance(value, ModuleType):
        return value.__name__.split(".")[0] == "torch"
    return value is Tensor


def _parted(graph: fx.Graph) -> tuple[fx.Graph, tuple[str, ...]] | None:
    """The arithmetic of a graph, and the children that are called behind it one by one."""
    behind: list[str] = []
    output = next(node for node in graph.nodes if node.op == "output")
    value = output.args[0]
    while isinstance(value, fx.Node) and value.op == "call_module":
        if len(value.args) != 1 or value.kwargs or len(value.users) != 1:
            return None
        behind.insert(0, str(value.target))
        value = value.args[0]
    if not isinstance(value, fx.Node):
        return None
    new, known = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node.op == "call_module" and str(node.target) not in behind:
            return None
        if not _is_arithmetic(node):
            return None
        if node.op not in ("call_module", "output"):
            known[node] = new.node_copy(node, known.__getitem__)
    if value not in known or any(["." in name for name in behind]):
        return None
    new.output(known[value])
    return new, tuple(behind)


def _is_arithmetic(node: fx.Node) -> bool:
    if node.op == "call_function":
        dtype = node.target is getattr and node.args[1:] == ("dtype",)
        return dtype or (node.target in _FUNCTIONS and "out" not in node.kwargs)
    return node.op != "call_method" or node.target in _METHODS


def _executed(graph: fx.Graph, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """What a graph gives for an x and the tensors of a module."""
    holder = nn.Module()
    for name, tensor in tensors.items():
        holder.register_buffer(name, tensor)
    out: Tensor = fx.Interpreter(holder, graph=graph).run(x)
    return out


def _stand_ins(channels: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    seed = torch.Generator().manual_seed(channels)
    values = {n: torch.rand(channels, dtype=torch.float64, generator=seed) + 0.5 for n in TENSORS}
    values["running_mean"] -= 1.0
    values["bias"] *= -3.0
    return {name: value.to(dtype) for name, value in values.items()}


def _x(shape: tuple[int, ...]) -> Tensor:
    return torch.linspace(-2.0, 3.0, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def _is_formula(graph: fx.Graph, shape: tuple[int, ...], eps: float) -> bool:
    x, given = _x(shape), _stand_ins(shape[1])
    before = {name: t.clone() for name, t in given.items()}
    out = _executed(graph, x.clone(), given)
    if any([not torch.equal(given[name], t) for name, t in before.items()]):
        return False
    weight, bias, mean, var = [given[name].view(1, -1, 1, 1) for name in TENSORS]
    right = weight * (x - mean) / (var + eps).sqrt() + bias
    # A handful of roundings of terms below 2^4.
    return out.shape == right.shape and bool(((out - right).abs() <= 2**-44).all())


def _constant(graph: fx.Graph) -> float:
    """The eps of a forward that has it as a number: what it gives for a variance of zero."""
    given = {name: torch.zeros(1, dtype=torch.float64) for name in TENSORS}
    given["weight"] += 1
    inverse = float(_executed(graph, torch.ones(1, 1, 1, 1, dtype=torch.float64), given))
    eps = 0.0 if inverse == float("inf") else inverse**-2
    # Numbers that people write have few digits.
    return float(f"{eps:.12g}")


def _keeps_dtype(graph: fx.Graph) -> bool:
    try:
        out = _executed(graph, _x((2, 3, 2, 2)).bfloat16(), _stand_ins(3, torch.float32))
    except Exception:
        return False
    return out.dtype == torch.bfloat16
