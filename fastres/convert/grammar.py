"""Finds in a traced forward the runs that the block core executes: whole blocks, and chains.

Operations are read in the order of the graph. A run grows along values that nothing else reads:
units of convolution, norm, activation and factor, and then the addition of a shortcut that starts
where the run does, or of any tensor. What a run does not know is left to the user's code, and runs
end in front of it and begin behind it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastres.block import pair
from fastres.block.layers import is_size
from fastres.nn import factors
from fastres.nn.frozen import frozen_of
from fastres.nn.genuine import (
    GELU,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Hardswish,
    Identity,
    LeakyReLU,
    MaxPool2d,
    ReLU,
    ReLU6,
    SiLU,
)
from fastres.nn.match import (
    ACTIVATIONS,
    Decline,
    Match,
    Parts,
    Projection,
    Steps,
    called_behind,
    convolution_of,
    has_activation,
    hooked,
    is_norm,
    match,
    max_pool_of,
)

Node = fx.Node


class Run(NamedTuple):
    """Nodes of a graph that are executed as one block.

    Attributes:
        parts: what they are made of.
        nodes: in the order of the graph; the value of the last is the run's.
        source: the value that it starts from.
        residual: the value that it adds, for the shortcut "tensor".
        factor: the value that its first unit multiplies by, where that was computed from `source`.
    """

    parts: Parts
    nodes: tuple[Node, ...]
    source: Node
    residual: Node | None = None
    factor: Node | None = None


class Found(NamedTuple):
    """What was found in a graph.

    Attributes:
        runs: in no order.
        same: each value -> the one that it is the same as, through identities.
        through: identities within runs, which are left out with them.
        declines: why there is not more.
        left: norms and additions that are in no run, and what runs end in front of, but for
            pooling, views and the like.
        missed: how many of these are the sums of residual blocks, and how many are norms.
    """

    runs: tuple[Run, ...]
    same: Mapping[Node, Node]
    through: frozenset[Node]
    declines: tuple[Decline, ...]
    left: tuple[Node, ...]
    missed: tuple[int, int]


def find_runs(graph: fx.Graph, modules: Mapping[str, nn.Module], root: nn.Module) -> Found:
    """The runs of a graph.

    Args:
        graph: of one forward.
        modules: the children that it calls, by their names.
        root: whose parameters it reads.
    """
    ops = {node: _operation(node, modules, root) for node in graph.nodes}
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    moments = _Moments(ops, {name: modules[str(name)] for name in calls}, calls)
    declines: dict[int, Decline] = {}
    while True:
        known = {
            n: None if op is None or id(op.module) in declines else op for n, op in ops.items()
        }
        runs = _Reader(known, moments).runs()
        declined = [(run, m) for run in runs if isinstance(m := match_run(run), Decline)]
        declined = [(run, d) for run, d in declined if not _is_sharded(d.module)]
        declined += [(run, d) for run in runs if (d := _disordered(run, ops)) is not None]
        if not declined:
            return _found(runs, ops, modules, declines.values())
        for run, decline in declined:
            declines[id(_culprit(run, decline.module))] = decline


def _found(
    runs: Sequence[Run],
    ops: Mapping[Node, _Op | None],
    modules: Mapping[str, nn.Module],
    declines: Iterable[Decline],
) -> Found:
    within = {node for run in runs for node in run.nodes}
    ends = {run.nodes[-1] for run in runs}
    same = _Values(ops).same
    through = [n for n, value in same.items() if n is not value and value in within - ends]
    left = []
    for node, op in ops.items():
        if node in within or same[node] is not node:
            continue
        behind = any([same[value] in ends for value in node.all_input_nodes])
        between = any([ops[reader] is not None for reader in node.users])
        counts = op is not None and op.kind in ("norm", "add")
        if counts or (behind and _interrupts(node, modules, between)):
            left.append(node)
    sums = [n for n in left if (op := ops[n]) is not None and op.kind == "add"]
    missed = (
        sum([_is_residual(node, ops) for node in sums]),
        sum([(op := ops[n]) is not None and op.kind == "norm" for n in left]),
    )
    return Found(tuple(runs), same, frozenset(through), tuple(declines), tuple(left), missed)


def _is_residual(node: Node, ops: Mapping[Node, _Op | None]) -> bool:
    """Whether a sum is a residual block's: one side stands behind a norm that the other does not,
    and both come from one value.
    """
    op = ops[node]
    assert op is not None
    left, right = [_ancestors(value) for value in op.values]
    norms = {n for n in left ^ right if (step := ops[n]) is not None and step.kind == "norm"}
    return bool(norms) and any([n.op != "get_attr" for n in left & right])


def _ancestors(node: Node) -> set[Node]:
    seen, waiting = {node}, [node]
    while waiting:
        new = [value for value in waiting.pop().all_input_nodes if value not in seen]
        seen.update(new)
        waiting += new
    return seen


def _interrupts(node: Node, modules: Mapping[str, nn.Module], between: bool) -> bool:
    """Whether a node behind a run is a step of a block or chain that the run does not know.

    `between`: whether another step goes on from it.
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        if not between and any([True for _ in module.children()]):
            return False
        norms = any([isinstance(m, nn.BatchNorm2d) or is_norm(m) for m in module.modules()])
        return type(module) not in _BETWEEN and not norms
    if node.op == "call_method":
        return node.target not in _VIEWS
    return node.op == "call_function" and node.target not in _RESHAPING


def _is_sharded(module: nn.Module | None) -> bool:
    """Whether a module's parameters are in parts that come together when it is called."""
    tensors = () if module is None else module._parameters.values()
    return any([type(tensor).__name__ == "DTensor" for tensor in tensors])


def _disordered(run: Run, ops: Mapping[Node, _Op | None]) -> Decline | None:
    """Whether a run would draw its random numbers behind those of a node that comes later."""
    own = [op.module for n in run.nodes if (op := ops[n]) is not None and _draws(op)]
    if not own:
        return None
    nodes = [*ops]
    between = nodes[nodes.index(run.nodes[0]) : nodes.index(run.nodes[-1])]
    others = [
        n for n in between if n not in run.nodes and (op := ops[n]) is not None and _draws(op)
    ]
    return Decline(own[0], "draws random numbers while another does") if others else None


def match_run(run: Run) -> Match | Decline:
    """What a run computes, in the terms of `fastres.block`."""
    return match(run.parts, alone=True)


def _culprit(run: Run, at_fault: nn.Module | None) -> nn.Module:
    """The module that no run may hold: the one at fault, or the run's child that has it inside."""
    own = [m for steps in run.parts.units for m in steps if m is not None]
    own += [m for m in (run.parts.end, run.parts.gate, run.parts.max_pool) if m is not None]
    projection = run.parts.projection
    if isinstance(projection, Projection):
        own += [m for m in projection if m is not None]
    for module in own:
        if any([inner is at_fault for inner in module.modules()]):
            return module
    return next(iter(own))


# ---------------------------------------------------------------- single operations


class _Op(NamedTuple):
    """A node as an operation that runs are made of.

    Attributes:
        kind: "conv", "norm", "act", "drop", "gate", "scale", "pool", "max_pool", "add" or
            "identity".
        values: what it computes from.
        module: what computes it; functions are stood in for by modules of ours.
        writes: whether it writes into its first value.
        factor: what a "scale" multiplies by, which was computed from its value.
    """

    kind: str
    values: tuple[Node, ...]
    module: nn.Module | None = None
    writes: bool = False
    factor: Node | None = None


_INPLACE = (("input", None), ("inplace", False))
#: Functions that compute an activation, their arguments, and a module of the same by their values.
_ACTS: dict[Any, tuple[tuple[tuple[str, Any], ...], Any]] = {
    F.relu: (_INPLACE, ReLU),
    F.silu: (_INPLACE, SiLU),
    F.relu6: (_INPLACE, ReLU6),
    F.hardswish: (_INPLACE, Hardswish),
    F.gelu: ((("input", None), ("approximate", "none")), GELU),
    F.leaky_relu: ((("input", None), ("negative_slope", 0.01), ("inplace", False)), LeakyReLU),
}
_RELU = ((("input", None),), ReLU)
_ACTS |= {torch.relu: _RELU, torch.relu_: _RELU, "relu": _RELU, "relu_": _RELU}
_ADDS: dict[Any, bool] = {
    operator.add: False, operator.iadd: True, torch.add: False, "add": False, "add_": True,
    "__add__": False, "__radd__": False, "__iadd__": True,
}  # fmt: skip
_DROPOUTS: dict[Any, type[nn.Module]] = {F.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d}
_POOL = (
    ("input", None), ("kernel_size", None), ("stride", None), ("padding", 0), ("ceil_mode", False),
    ("count_include_pad", True), ("divisor_override", None),
)  # fmt: skip


def _operation(node: Node, modules: Mapping[str, nn.Module], root: nn.Module) -> _Op | None:
    if node.op == "call_module":
        return _called(node, modules[str(node.target)])
    if node.op not in ("call_function", "call_method"):
        return None
    target: Any = node.target
    if target is F.conv2d:
        return _convolution(node, root)
    for read in (_activation, _add, _scale, _dropout, _pool, _max_pool):
        if (op := read(node, target)) is not None:
            return op
    return None


def _called(node: Node, module: nn.Module) -> _Op | None:
    kind = _kind(module)
    if kind == "identity" and hooked(module) is not None:
        return None
    if kind is None or node.kwargs or len(node.args) != 1 or not isinstance(node.args[0], Node):
        return None
    # Dropout in place writes only where it is at work, and a factor is drawn apart then.
    writes = kind in ("act", "drop") and bool(getattr(module, "inplace", False))
    return _Op(kind, (node.args[0],), module, writes)


def _kind(module: nn.Module) -> str | None:
    cls = type(module)
    exact = {Conv2d: "conv", AvgPool2d: "pool", Identity: "identity"}
    if cls is MaxPool2d:
        return None if isinstance(max_pool_of(module), Decline) else "max_pool"
    if cls in exact or cls in ACTIVATIONS:
        return exact.get(cls, "act")
    if is_norm(module):
        return "norm"
    if factors.drop_of(module) is not None:
        return "drop"
    return "gate" if factors.gate_of(module) is not None else None


def _given(node: Node, names: tuple[tuple[str, Any], ...]) -> dict[str, Any] | None:
    """The arguments of a call by their names, or None where they are others."""
    if len(node.args) > len(names) or any([key not in dict(names) for key in node.kwargs]):
        return None
    positional = zip([name for name, _ in names], node.args, strict=False)
    return {**dict(names), **dict(positional), **node.kwargs}


_CONV = (
    ("input", None), ("weight", None), ("bias", None), ("stride", 1), ("padding", 0),
    ("dilation", 1), ("groups", 1),
)  # fmt: skip


def _convolution(node: Node, root: nn.Module) -> _Op | None:
    """A convolution by its function, of a weight and bias that one module has by these names."""
    given = _given(node, _CONV)
    if given is None or not isinstance(value := given.pop("input"), Node):
        return None
    owner, weight = _parameter(given.pop("weight"), root)
    other, bias = _parameter(given.pop("bias"), root)
    if owner is None or weight != "weight" or (bias is not None and other is not owner):
        return None
    if bias != (None if owner._parameters.get("bias") is None else "bias"):
        return None
    stride, padding, dilation, groups = given.values()
    if type(groups) is not int or not all([is_size(v) for v in (stride, padding, dilation)]):
        return None
    conv = convolution_of(owner, pair(stride), pair(padding), pair(dilation), groups)
    return _Op("conv", (value,), conv)


def _parameter(node: Any, root: nn.Module) -> tuple[nn.Module | None, str | None]:
    """The module that has a parameter by itself, and its name there."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None, None if node is None else ""
    path, _, name = str(node.target).rpartition(".")
    owner = root.get_submodule(path)
    return (owner, name) if name in owner._parameters else (None, "")


def _activation(node: Node, target: Any) -> _Op | None:
    if target not in _ACTS:
        return None
    names, make = _ACTS[target]
    given = _given(node, names)
    if given is None or not isinstance(value := given.pop("input"), Node):
        return None
    writes = target in (torch.relu_, "relu_") or given.pop("inplace", False)
    if type(writes) is not bool or any([type(v) not in (str, float) for v in given.values()]):
        return None
    return _Op("act", (value,), make(**given), writes)


def _add(node: Node, target: Any) -> _Op | None:
    if target not in _ADDS:
        return None
    given = _given(node, (("input", None), ("other", None), ("alpha", 1)))
    if given is None or given["alpha"] != 1:
        return None
    values = (given["input"], given["other"])
    if not all([isinstance(value, Node) for value in values]) or values[0] is values[1]:
        return None
    return _Op("add", values, None, _ADDS[target])


_MULTIPLIES = (operator.mul, torch.mul, "mul", "__mul__")


def _scale(node: Node, target: Any) -> _Op | None:
    """A product of a value with what was computed from it, as any attention to channels ends."""
    given = _given(node, (("input", None), ("other", None))) if target in _MULTIPLIES else None
    if given is None or not all([isinstance(value, Node) for value in given.values()]):
        return None
    for value, factor in (given.values(), reversed(given.values())):
        if factor is not value and value in _ancestors(factor):
            return _Op("scale", (value,), factors.Factor(), factor=factor)
    return None


def _dropout(node: Node, target: Any) -> _Op | None:
    if target not in _DROPOUTS:
        return None
    given = _given(node, (("input", None), ("p", 0.5), ("training", True), ("inplace", False)))
    if given is None or not isinstance(given["input"], Node):
        return None
    rate, training, in_place = given["p"], given["training"], given["inplace"]
    if type(rate) not in (float, int) or type(training) is not bool or type(in_place) is not bool:
        return None
    if not 0 <= rate <= 1:
        return None
    module = _DROPOUTS[target](rate).train(training)  # type: ignore[call-arg]
    return _Op("drop", (given["input"],), module, in_place)


def _pool(node: Node, target: Any) -> _Op | None:
    if target is not F.avg_pool2d:
        return None
    given = _given(node, _POOL)
    if given is None or not isinstance(given.pop("input"), Node):
        return None
    if any([isinstance(value, Node) for value in given.values()]):
        return None
    kernel, stride, *rest = given.values()
    return _Op("pool", (node.all_input_nodes[0],), AvgPool2d(kernel, stride or None, *rest))


_MAX_POOL = (
    ("input", None), ("kernel_size", None), ("stride", None), ("padding", 0), ("dilation", 1),
    ("ceil_mode", False), ("return_indices", False),
)  # fmt: skip


def _max_pool(node: Node, target: Any) -> _Op | None:
    if target not in (F.max_pool2d, torch.max_pool2d):
        return None
    given = _given(node, _MAX_POOL[:-1] if target is torch.max_pool2d else _MAX_POOL)
    if given is None or not isinstance(given.pop("input"), Node):
        return None
    if any([isinstance(value, Node) for value in given.values()]):
        return None
    given["stride"] = given["stride"] or None
    module = MaxPool2d(**given)
    if isinstance(max_pool_of(module), Decline):
        return None
    return _Op("max_pool", (node.all_input_nodes[0],), module)


# ---------------------------------------------------------------- what may happen in another order

_PURE_FUNCTIONS: set[Any] = {
    getattr, operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv,
    operator.floordiv, operator.neg, operator.mod, operator.eq, operator.gt, operator.lt,
    torch.add, torch.sub, torch.mul, torch.cat, torch.flatten, torch.mean, torch.sigmoid,
    torch.relu, torch.tanh, torch.zeros_like, torch.permute, torch.chunk, torch.split, F.pad,
    F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.interpolate, F.sigmoid, F.softmax,
}  # fmt: skip
_PURE_METHODS = {
    "size", "dim", "view", "reshape", "flatten", "mean", "permute", "transpose", "contiguous",
    "chunk", "split", "expand", "expand_as", "unsqueeze", "squeeze", "repeat", "new_zeros", "to",
    "sigmoid", "add", "mul", "relu",
}  # fmt: skip
_PURE_MODULES: set[type] = {
    *ACTIVATIONS, Conv2d, BatchNorm2d, AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Sigmoid,
    nn.Upsample, nn.ZeroPad2d, nn.Linear, nn.Flatten,
}  # fmt: skip


#: What may stand between two runs, or behind the last one, without being missed in them.
_BETWEEN = {
    Conv2d, AvgPool2d, Identity, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Upsample, nn.UpsamplingBilinear2d, nn.ZeroPad2d, nn.Linear, nn.Flatten, nn.Dropout,
    nn.Dropout2d, nn.ConvTranspose2d, nn.PixelShuffle,
}  # fmt: skip
_RESHAPING: set[Any] = {
    getattr, operator.getitem, torch.cat, torch.flatten, torch.mean, torch.chunk, torch.split,
    F.pad, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.interpolate,
    F.dropout, F.linear,
}  # fmt: skip
_VIEWS = _PURE_METHODS - {"sigmoid", "add", "mul", "relu"}


def _is_pure(node: Node, module: nn.Module | None, calls: int) -> bool:
    """Whether it makes no difference when a node runs, as long as its values are there.

    A module that is called more than once may be a norm, whose updates have an order.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if module is not None:
        known = type(module) in _PURE_MODULES or frozen_of(module) is not None
        return known and calls == 1 and not any([_writes(m) for m in module.modules()])
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return False
    table = _PURE_METHODS if node.op == "call_method" else _PURE_FUNCTIONS
    return node.target in table


def _writes(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))


# ---------------------------------------------------------------- runs


class _Chain(NamedTuple):
    """A run as far as it has been read; see `Run`."""

    source: Node
    nodes: tuple[Node, ...]
    epoch: int
    units: tuple[Steps, ...] = ()
    pool: nn.Module | None = None
    gate: nn.Module | None = None
    shortcut: str = "none"
    projection: Projection | None = None
    residual: Node | None = None
    end: nn.Module | None = None
    factor: Node | None = None
    max_pool: nn.Module | None = None

    def grown(self, op: _Op) -> _Chain | None:
        """The chain with one more operation, or None where it ends before it."""
        if self.max_pool is not None:
            return None
        if op.kind == "max_pool":
            return self._replace(max_pool=op.module) if self.may_be_pooled else None
        if self.shortcut != "none":
            ends = op.kind == "act" and self.end is None
            return self._replace(end=op.module) if ends else None
        if op.kind == "scale":
            starts = not self.units and self.pool is None and self.gate is None
            return (
                self._replace(units=(Steps(drop=op.module),), factor=op.factor) if starts else None
            )
        # What a factor is for is the sum behind it.
        if self.factor is not None and op.kind != "drop":
            return None
        if op.kind == "pool":
            return None if self.units or self.pool is not None else self._replace(pool=op.module)
        if self.gate is not None and op.kind != "drop":
            return None
        if op.kind == "gate":
            open_end = self.units and self.units[-1].act is None and self.units[-1].drop is None
            return self._replace(gate=op.module) if open_end else None
        return self._replace(units=_with_step(self.units, op))

    @property
    def may_be_pooled(self) -> bool:
        """Whether max pooling behind it can be its end."""
        simple = self.shortcut == "none" and self.gate is None and self.factor is None
        return simple and self.normalises and self.units[-1].drop is None

    @property
    def projects(self) -> Projection | None:
        """The chain as a projection, where it can be one."""
        if len(self.units) != 1 or self.shortcut != "none" or self.gate is not None:
            return None
        if self.max_pool is not None:
            return None
        conv, norm, act, drop = self.units[0]
        if conv is None or act is not None or drop is not None:
            return None
        if norm is not None and any([type(m) is not Identity for m in called_behind(norm)]):
            return None
        return Projection(conv, norm, self.pool)  # type: ignore[arg-type]

    @property
    def behind_pool(self) -> _Chain:
        """The chain without the pooling that it began with."""
        if self.pool is None:
            return self
        return self._replace(source=self.nodes[0], nodes=self.nodes[1:], pool=None)

    @property
    def leads(self) -> bool:
        """Whether it is a norm, perhaps with an activation, and nothing more."""
        if len(self.units) != 1 or self.pool is not None or self.shortcut != "none":
            return False
        if self.max_pool is not None:
            return False
        conv, norm, _, drop = self.units[0]
        return conv is None and norm is not None and drop is None and self.gate is None

    @property
    def normalises(self) -> bool:
        """Whether there is a norm on its main path, in front of or behind something else."""
        steps = [m for unit in self.units for m in unit if m is not None]
        norms = [unit.norm for unit in self.units if unit.norm is not None]
        joined = self.shortcut != "none"
        if self.factor is not None:
            return joined
        return bool(norms) and (len(steps) > 1 or joined or has_activation(norms[0]))


def _with_step(units: tuple[Steps, ...], op: _Op) -> tuple[Steps, ...]:
    """The units with one more step, in the last one where that is still to come there."""
    order = Steps._fields.index(op.kind)
    last = units[-1] if units else None
    if last is None or any([m is not None for m in last[order:]]):
        return (*units, Steps(**{op.kind: op.module}))
    return (*units[:-1], last._replace(**{op.kind: op.module}))


def _draws(op: _Op) -> bool:
    """Whether an operation may draw random numbers: its mode can change by itself."""
    return op.kind == "drop"


class _Values:
    """Which values of a graph are one and the same, and who reads them."""

    def __init__(self, ops: Mapping[Node, _Op | None]) -> None:
        self.same: dict[Node, Node] = {}
        self.readers: dict[Node, list[Node]] = {node: [] for node in ops}
        self._ops = ops
        for node, op in ops.items():
            if op is not None and op.kind == "identity":
                self.same[node] = self.same[op.values[0]]
                continue
            self.same[node] = node
            for value in node.all_input_nodes:
                self.readers[self.same[value]].append(node)

    def is_fresh(self, value: Node) -> bool:
        """Whether a value is memory of its own, made by a step, that one node alone reads."""
        op = self._ops[value]
        if len(self.readers[value]) != 1 or op is None:
            return False
        if op.kind not in ("conv", "norm", "act", "add", "drop"):
            return False
        # Dropout that is not at work gives what it was given.
        passes = op.writes or op.kind == "drop"
        return not passes or self.is_fresh(self.same[op.values[0]])


#: Steps whose values are images for certain, or what they were.
_IMAGES = {"conv", "norm", "act", "add"}


class _Moments(dict[Node, int]):
    """How many nodes that have to stay where they are come before each node of a graph."""

    def __init__(
        self,
        ops: Mapping[Node, _Op | None],
        modules: Mapping[Any, nn.Module],
        calls: Mapping[Any, int],
    ) -> None:
        super().__init__()
        values, now = _Values(ops), 0
        for node, op in ops.items():
            module = modules[node.target] if node.op == "call_module" else None
            free = _is_pure(node, module, calls.get(node.target, 0))
            stays = not free and not _moves(op, values)
            now += stays
            self[node] = now
            now += stays


def _moves(op: _Op | None, values: _Values) -> bool:
    """Whether a step of runs writes, if at all, into what nobody else reads."""
    return op is not None and (not op.writes or values.is_fresh(values.same[op.values[0]]))


class _Reader:
    """Reads a graph once."""

    def __init__(self, ops: Mapping[Node, _Op | None], moments: Mapping[Node, int]) -> None:
        self._ops, self._epochs = ops, moments
        self._values = values = _Values(ops)
        self._same, self._readers = values.same, values.readers
        #: Chains by the value that they give; those that others went on from are gone.
        self._open: dict[Node, _Chain] = {}

    def runs(self) -> list[Run]:
        """Every run of the graph."""
        for node, op in self._ops.items():
            if op is None or op.kind == "identity":
                continue
            chain = self._joined(node, op) if op.kind == "add" else self._continued(node, op)
            if chain is not None:
                self._open[node] = chain
        places = {node: i for i, node in enumerate(self._ops)}
        runs = [_as_run(chain, places) for chain in self._open.values()]
        return [run for run in runs if run is not None]

    def _end_of(self, value: Node, reader: Node) -> _Chain | None:
        """The chain that gives a value, where `reader` alone reads it and can go on from it."""
        chain = self._open.get(value)
        if chain is None or len(self._readers[value]) != 1:
            return None
        return chain if chain.epoch == self._epochs[reader] else None

    def _continued(self, node: Node, op: _Op) -> _Chain | None:
        value = self._same[op.values[0]]
        before = self._end_of(value, node)
        if before is not None and (longer := before.grown(op)) is not None:
            del self._open[value]
            return longer._replace(nodes=(*before.nodes, node))
        # What is written into, or passed on, is not the run's own.
        if op.writes or op.kind in ("drop", "gate"):
            return None
        made = self._ops[value]
        if op.kind == "scale" and (made is None or made.kind not in _IMAGES):
            return None
        return _Chain(value, (node,), self._epochs[node]).grown(op)

    def _joined(self, node: Node, op: _Op) -> _Chain | None:
        """The chain that ends in an addition; a shortcut from its own start is preferred."""
        left, right = [self._same[value] for value in op.values]
        for find in (self._with_shortcut, self._with_residual):
            for end, side in ((left, right), (right, left)):
                main = self._end_of(end, node)
                if main is None or main.shortcut != "none" or not main.units:
                    continue
                if main.max_pool is not None:
                    continue
                chain = find(node, main.behind_pool, side)
                if chain is None:
                    continue
                # What is written into is the run's own, or nobody else's.
                if op.writes and left not in chain.nodes and not self._values.is_fresh(left):
                    continue
                del self._open[end]
                if chain.projection is not None:
                    del self._open[side]
                return self._activated(chain._replace(nodes=(*chain.nodes, node)), node)
        return None

    def _with_shortcut(self, node: Node, main: _Chain, side: Node) -> _Chain | None:
        if side is main.source:
            return main._replace(shortcut="input")
        beside = self._end_of(side, node)
        if beside is None or beside.source is not main.source or beside.projects is None:
            return None
        if not any([unit.norm is not None for unit in main.units]):
            return None
        nodes = (*main.nodes, *beside.nodes)
        return main._replace(shortcut="input", projection=beside.projects, nodes=nodes)

    def _with_residual(self, node: Node, main: _Chain, side: Node) -> _Chain | None:
        norms = any([unit.norm is not None for unit in main.units])
        if main.gate is not None or not (norms or main.factor is not None):
            return None
        return main._replace(shortcut="tensor", residual=side)

    def _activated(self, chain: _Chain, node: Node) -> _Chain:
        """The chain behind the norm and activation that main path and shortcut share."""
        first = self._open.get(chain.source)
        if chain.shortcut != "input" or first is None or not first.leads or chain.gate is not None:
            return chain
        readers = self._readers[chain.source]
        if first.epoch != chain.epoch or any([reader not in chain.nodes for reader in readers]):
            return chain
        del self._open[chain.source]
        return chain._replace(
            source=first.source,
            nodes=(*first.nodes, *chain.nodes),
            units=(*first.units, *chain.units),
            shortcut="activated",
        )


def _as_run(chain: _Chain, places: Mapping[Node, int]) -> Run | None:
    """A chain as a run, where it is worth one."""
    if not chain.units or not chain.normalises:
        return None
    chain = chain.behind_pool
    units, end = chain.units, chain.end
    if chain.shortcut == "none" and units[-1].drop is None and chain.gate is None:
        end = units[-1].act
        units = (*units[:-1], units[-1]._replace(act=None))
    parts = Parts(
        units, end, chain.shortcut, chain.projection, gate=chain.gate, max_pool=chain.max_pool
    )
    nodes = tuple(sorted(chain.nodes, key=places.__getitem__))
    return Run(parts, nodes, chain.source, chain.residual, chain.factor)


def modules_of(graph: fx.Graph, root: nn.Module) -> dict[str, nn.Module]:
    """The children that a graph calls, by their names."""
    names = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    return {name: root.get_submodule(name) for name in names}
