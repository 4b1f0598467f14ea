"""What a network was seen to compute: one run, each of torch's operators with where it came from.

Nothing here knows what fastres recognises. Operators are seen below autograd, by a dispatch mode,
and modules by their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.block.spec import decode
from fastres.block.tensors import split_tensors

#: Operators that a shortcut may hold: they are linear, or choose among values.
LINEAR = {
    "convolution", "native_batch_norm", "_native_batch_norm_legit", "avg_pool2d", "max_pool2d",
    "max_pool2d_with_indices", "constant_pad_nd", "slice", "select", "view", "_unsafe_view",
    "split", "split_with_sizes", "clone", "detach", "_to_copy", "alias", "expand", "contiguous",
    "reflection_pad2d", "cat", "unsqueeze", "mul", "mul_", "add", "add_", "dropout",
    "native_dropout", "getitem",
}  # fmt: skip


@dataclass(eq=False)
class Call:
    """One call of a module; `parent` is the one around it."""

    module: nn.Module
    parent: Call | None


@dataclass(eq=False)
class Value:
    """A four-dimensional activation.

    Attributes:
        shape: [N, C, H, W].
        step: what made it; None for what was there before.
    """

    shape: tuple[int, ...]
    step: Step | None


@dataclass(eq=False)
class Step:
    """One call of an operator.

    Attributes:
        kind: the operator's name, or "norm" for each that a batch norm's module calls itself.
        given: the activations that it reads.
        call: the module whose forward called it, and so on outwards.
        module: the convolution or the norm that it belongs to.
        mark: of a sum of two activations, what tells its value from others.
    """

    kind: str
    given: list[Value]
    call: Call | None
    module: nn.Module | None = None
    mark: tuple[Any, ...] = ()

    def within(self, call: Call) -> bool:
        """Whether a call of a module led to it."""
        around = self.call
        while around is not None and around is not call:
            around = around.parent
        return around is call


@dataclass
class Run:
    """What one run of a network did.

    Attributes:
        steps: of torch's operators on activations, in their order.
        units: the weights of convolutions that were fused with a norm.
        tensors: everything that fused blocks were given.
    """

    steps: list[Step] = field(default_factory=list)
    units: list[Tensor] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)


def record(run: Callable[[], object], modules: bool) -> Run:
    """What `run` does.

    Args:
        run: called once, without gradients.
        modules: whether to tell by whose forward; that puts hooks on every module.
    """
    recorder = _Recorder()
    with torch.no_grad(), recorder.calls() if modules else _nothing(), recorder:
        run()
    return recorder.run


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm over images, frozen or not, of whatever class."""
    running = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    return all([isinstance(t, Tensor) and t.dim() == 1 for t in running])


class _Recorder(TorchDispatchMode):
    sees_fused_blocks = True

    def __init__(self) -> None:
        super().__init__()
        self.run = Run()
        self._values: dict[int, Value] = {}
        self._alive: list[Any] = []
        self._call: Call | None = None

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Hooks that tell which modules are being called."""

        def enter(module: nn.Module, _: object) -> None:
            self._call = Call(module, self._call)

        def leave(module: nn.Module, *_: object) -> None:
            assert self._call is not None
            self._call = self._call.parent

        hooks = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        given = [self._values[id(t)] for t in leaves if self._is_known(t)]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.fastres.block_forward.default:
            self._add_fused(args)
        step = self._step(func, given, out)
        if step is not None:
            self.run.steps.append(step)
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.dim() >= 2:
                self._values[id(t)] = Value((*t.shape,), step)
                self._alive.append(t)
        return out

    def _is_known(self, t: object) -> bool:
        if not isinstance(t, Tensor) or isinstance(t, nn.Parameter) or t.dim() < 2:
            return False
        if id(t) not in self._values:
            self._values[id(t)] = Value((*t.shape,), None)
            self._alive.append(t)
        return True

    def _step(self, func: Any, given: list[Value], out: Any) -> Step | None:
        if not given:
            return None
        step = Step(func._schema.name.rpartition("::")[2], given, self._call)
        inner = None if self._call is None else self._call.module
        if inner is not None and is_norm(inner):
            step.kind, step.module = "norm", inner
        elif isinstance(inner, nn.Conv2d) and step.kind == "convolution":
            step.module = inner
        elif step.kind in ("add", "add_") and _sums(given):
            step.kind, step.mark = "addition", mark_of(out)
        return step

    def _add_fused(self, args: Any) -> None:
        block = decode(args[3])
        units = split_tensors(args[2])
        self.run.tensors += [t for t in args[2] if t is not None]
        for spec, tensors in zip(block.all_units, units, strict=True):
            if spec.conv is not None and spec.norm is not None and tensors.weight is not None:
                self.run.units.append(tensors.weight)


def _sums(given: Sequence[Value]) -> bool:
    return len(given) == 2 and len(given[0].shape) == 4 and given[0].shape == given[1].shape


def mark_of(t: Tensor) -> tuple[Any, ...]:
    """Shape and two sums of an activation, to know it again by."""
    flat = t.detach().double().flatten()
    weights = torch.sin(torch.arange(flat.numel(), dtype=torch.float64) + 1)
    return ((*t.shape,), float(flat @ weights), float(flat.abs().sum()))


def same_mark(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two activations are the same up to rounding in float64."""
    return a[0] == b[0] and all(
        [abs(x - y) <= 1e-9 * b[2] for x, y in zip(a[1:], b[1:], strict=True)]
    )


# ---------------------------------------------------------------- what is counted


def pairs(run: Run) -> list[tuple[nn.Module, nn.Module]]:
    """Each convolution and batch norm of which the second reads what the first gives."""
    found: dict[tuple[nn.Module, nn.Module], None] = {}
    for step in run.steps:
        before = step.given[0].step
        if step.kind != "norm" or before is None or before.kind != "convolution":
            continue
        if step.module is not None and before.module is not None:
            found[before.module, step.module] = None
    return [*found]


@dataclass
class Residual:
    """A residual block: the forward of one module, and the norms on both ways to its sums."""

    module: nn.Module
    norms: dict[nn.Module, None]
    marks: list[tuple[Any, ...]]


def residuals(run: Run) -> list[Residual]:
    """The residual blocks of a run.

    A module's forward is one where it adds two activations that come from one value, or from its
    arguments: the one through a convolution and a batch norm and through no other module's such
    sum, the other, the shortcut, through linear operators alone.
    """
    found: dict[Call, Residual] = {}
    for step in run.steps:
        if step.kind != "addition" or step.call is None:
            continue
        norms = _ways(step, step.call, {*found})
        if norms is not None:
            block = found.setdefault(step.call, Residual(step.call.module, {}, []))
            block.norms.update(norms)
            block.marks.append(step.mark)
    return [*found.values()]


def _ways(step: Step, call: Call, blocks: set[Call]) -> dict[nn.Module, None] | None:
    """The norms on both ways to a sum, or None where that is not a residual block's."""
    for main, side in (step.given, step.given[::-1]):
        shortcut, own = _shortcut(side, call)
        seen: dict[Value, None] = {}
        if _reaches(main, shortcut, side.step is None or not side.step.within(call), call, seen):
            steps = [v.step for v in seen if v.step is not None and v.step.within(call)]
            other = [
                s for s in steps if s.kind == "addition" and s.call is not call and s.call in blocks
            ]
            kinds = {s.kind for s in steps}
            if not other and kinds >= {"convolution", "norm"}:
                steps += own
                return {s.module: None for s in steps if s.kind == "norm" and s.module is not None}
    return None


def _shortcut(side: Value, call: Call) -> tuple[set[Value], list[Step]]:
    """The values that a shortcut may start from, and its own steps."""
    values, steps, waiting = {side}, [], [side]
    while waiting:
        step = waiting.pop().step
        if step is None or not step.within(call) or step.kind not in (*LINEAR, "norm"):
            continue
        steps.append(step)
        new = [v for v in step.given if v not in values]
        values.update(new)
        waiting += new
    return values, steps


def _reaches(
    main: Value, shortcut: set[Value], outside: bool, call: Call, seen: dict[Value, None]
) -> bool:
    """Whether a way leads back from a value to the shortcut's, or both come from outside."""
    if main in shortcut:
        return False
    reached, waiting = False, [main]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        if value in shortcut:
            reached = True
            continue
        if value.step is None or not value.step.within(call):
            reached = reached or outside
            continue
        seen[value] = None
        waiting += value.step.given
    return reached
