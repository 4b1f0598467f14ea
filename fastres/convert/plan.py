"""How a module that was traced runs: its runs fused, and all between them as the user wrote it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastres.block.call import autocasts, execute
from fastres.convert.frozen import learn
from fastres.convert.grammar import Found, Run, find_runs, match_run, modules_of
from fastres.convert.guard import Guard, UnknownError
from fastres.convert.trace import NotTraced, Trace, trace
from fastres.nn.bound import Bound, simple
from fastres.nn.fused import explained, run_match
from fastres.nn.match import Decline


class RunNow:
    """A run that is executed in place of its nodes; they run themselves where it cannot be."""

    def __init__(self, run: Run, same: Mapping[fx.Node, fx.Node]) -> None:
        self.run = run
        self._same = same
        self._bound: Bound | None = None
        self._nodes: Callable[..., Any] | None = None

    def __call__(self, module: nn.Module, x: Any, residual: Any = None, factor: Any = None) -> Any:
        if torch.compiler.is_compiling():
            out = _compiled_run(self.run, x, residual, factor)
            return self._run_nodes(module, x, residual, factor) if out is None else out
        bound = self._bound
        if bound is None or not bound.holds(module):
            bound = self._bind(module)
        out = None if bound is None else _fused(bound, x, residual, factor)
        return self._run_nodes(module, x, residual, factor) if out is None else out

    def _bind(self, module: nn.Module) -> Bound | None:
        matched = match_run(self.run)
        if isinstance(matched, Decline):
            return None
        bound = Bound(module, self.run.parts, matched)
        # Tensors that were computed, as torch.func.functional_call puts in, are not held on to.
        kept = all([t is None or t.is_leaf for layer in matched.layers for t in layer.parameters])
        self._bound = bound if kept else None
        return bound

    def prepare(self) -> None:
        """Make the function that executes the nodes, which a compiler cannot."""
        if self._nodes is None:
            self._nodes = _nodes_of(self.run, self._same)

    def _run_nodes(self, module: nn.Module, x: Any, residual: Any, factor: Any) -> Any:
        self.prepare()
        assert self._nodes is not None
        return self._nodes(module, x, residual, factor)


def _compiled_run(run: Run, x: Any, residual: Any, factor: Any) -> Tensor | None:
    """As `_fused`, where a compiler traces what a match reads."""
    matched = match_run(run)
    if isinstance(matched, Decline):
        return None
    given = residual if matched.block.shortcut == "tensor" else None
    return run_match(matched, x, given, factor)


def _fused(bound: Bound, x: Any, residual: Any, factor: Any) -> Tensor | None:
    """The run's value, or None where it cannot be fused; then nothing was changed."""
    matched = bound.match
    given = residual if matched.block.shortcut == "tensor" else None
    if not isinstance(x, Tensor) or (residual is not None and not isinstance(residual, Tensor)):
        return None
    if matched.drops or matched.gate is not None or not simple(x):
        return run_match(matched, x, given, factor)
    if given is not None and type(given) not in (Tensor, nn.Parameter):
        return run_match(matched, x, given)
    if autocasts(x.device.type):
        return bound.run_autocast(x, given)
    call = bound.call(x, given)
    return None if call is None else execute(call, x, given)


def _nodes_of(run: Run, same: Mapping[fx.Node, fx.Node]) -> Callable[..., Any]:
    """A function that executes a run's nodes one by one."""
    new = fx.Graph()
    known = {run.source: new.placeholder("x")}
    for name, value in (("residual", run.residual), ("factor", run.factor)):
        placeholder = new.placeholder(name)
        if value is not None:
            known[value] = placeholder
    for node in run.nodes:
        for value in node.all_input_nodes:
            if value.op == "get_attr" and value not in known:
                known[value] = new.node_copy(value)
        known[node] = new.node_copy(node, lambda value: known[same[value]])
    new.output(known[run.nodes[-1]])
    return _compiled(new)


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The function (self, *placeholders) that a graph stands for."""
    code = graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(code.src, names)
    function: Callable[..., Any] = names["forward"]
    return function


class Plan(NamedTuple):
    """What is executed for a module, as long as the guard holds.

    Attributes:
        function: (module, module, *tensors) -> what the forward returns.
        guard: what was traced.
        inside: the children that were looked into.
        found: the runs and what is between them.
        runs: as `function` executes them.
    """

    function: Callable[..., Any]
    guard: Guard
    inside: tuple[nn.Module, ...]
    found: Found
    runs: tuple[RunNow, ...]

    @property
    def holds_blocks(self) -> bool:
        """Whether a run of it has a shortcut."""
        return any([run.parts.shortcut != "none" for run in self.found.runs])


def make_plan(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: Collection[nn.Module],
    able: Callable[[nn.Module], bool],
) -> Plan | NotTraced:
    """Trace a module's forward and find its runs; arguments as for `trace`.

    Children that no run needs to be looked into for are called as they are. Anybody's code runs
    here, and anybody's objects are compared: whatever goes wrong is a reason.

    `able`: whether a child finds its runs by itself.
    """
    try:
        return _make_plan(module, forward, args, kwargs, {*leaves}, able)
    except UnknownError as error:
        return NotTraced(module, str(error))
    except Exception as error:
        return NotTraced(module, f"cannot be read: {type(error).__name__}: {error}")


def _make_plan(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: set[nn.Module],
    able: Callable[[nn.Module], bool],
) -> Plan | NotTraced:
    learn(module)
    while True:
        traced = trace(module, forward, args, kwargs, leaves)
        if isinstance(traced, NotTraced):
            return traced
        modules = modules_of(traced.graph, module)
        found = find_runs(traced.graph, modules, module)
        idle = _idle(module, traced, found, able)
        if not idle:
            break
        leaves |= idle
    guard = Guard(module, traced, modules.values())
    runs = {run.nodes[-1]: RunNow(run, found.same) for run in found.runs}
    function = _function(traced.graph, found, runs)
    return Plan(function, guard, traced.inside[1:], found, (*runs.values(),))


def _idle(
    module: nn.Module, traced: Trace, found: Found, able: Callable[[nn.Module], bool]
) -> set[nn.Module]:
    """The children that were looked into for nothing: no run goes in or out, or around them, and
    those inside are found without it.
    """
    places = {node: i for i, node in enumerate(traced.graph.nodes)}
    inner: dict[str, list[fx.Node]] = {}
    for node in places:
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            inner.setdefault(path, []).append(node)
    # A child without a node of its own, as an empty nn.Sequential, changes nothing.
    needed = {id(module)} | {id(m) for m in traced.inside}
    children = {path: module.get_submodule(path) for path in inner}
    alone = [
        {*inner[path]} for path, child in children.items() if child is not module if able(child)
    ]
    for path, nodes in inner.items():
        child, own = children[path], {*nodes}
        if child is module or any([_concerns(run, nodes, places) for run in found.runs]):
            continue
        runs = [{*run.nodes} for run in found.runs if own.issuperset(run.nodes)]
        if all([any([run <= part <= own for part in alone]) for run in runs]):
            needed.discard(id(child))
    return {child for child in traced.inside[1:] if id(child) not in needed}


def _concerns(run: Run, nodes: list[fx.Node], places: dict[fx.Node, int]) -> bool:
    own = [node in run.nodes for node in nodes]
    if any(own):
        return len({*run.nodes} - {*nodes}) > 0
    first, last = places[run.nodes[0]], places[run.nodes[-1]]
    return any([first < places[node] < last for node in nodes])


def _function(graph: fx.Graph, found: Found, runs: Mapping[fx.Node, RunNow]) -> Callable[..., Any]:
    """The graph with each run as one call, at the place of its last node."""
    within = {node for run in found.runs for node in run.nodes} | found.through
    new = fx.Graph()
    module = new.placeholder("fastres_module")
    known: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if (now := runs.get(node)) is not None:
            values = (now.run.source, now.run.residual, now.run.factor)
            given = (module, *[None if value is None else known[value] for value in values])
            known[node] = new.call_function(_as_function(now), given)
        elif node.op == "output":
            new.output(fx.node.map_arg(node.args[0], known.__getitem__))
        elif node not in within:
            known[node] = new.node_copy(node, known.__getitem__)
    for node in [*new.nodes]:
        if node.op == "get_attr" and not node.users:
            new.erase_node(node)
    return _compiled(new)


def _as_function(run: RunNow) -> Callable[..., Any]:
    def fused_run(module: nn.Module, x: Any, residual: Any, factor: Any) -> Any:
        return run(module, x, residual, factor)

    return fused_run


def why_not_whole(module: nn.Module, plan: Plan) -> str:
    """What is in the way of the norms and additions of a module that are in no run, or ""."""
    found = plan.found
    if not found.left:
        return ""
    for decline in found.declines:
        return explained(module, decline)
    children = [node for node in found.left if node.op == "call_module"]
    if children:
        child = module.get_submodule(str(children[0].target))
        return f"{children[0].target} is a {type(child).__name__}, which is not fused"
    target: Any = found.left[0].target
    return f"{getattr(target, '__name__', target)} is not fused"
