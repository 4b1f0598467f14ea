"""Plans of traced modules under torch.compile.

A compiler reads the plan's function as it reads anybody's code. What the plan was read off is held
to what it was by a guard of the compiler's, which asks the plan's own: the same look as in eager
mode, at each call of the compiled code.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

#: Whether this torch's compiler takes guards of others, and modules as constants of a trace.
#: Nothing that it promises says so: in a version that was not tried the user's forward is traced.
GUARDS = TorchVersion("2.13") <= TorchVersion(torch.__version__) < TorchVersion("2.14")

#: The functions of plans that a compiler has asked for, where it finds them: by an attribute.
FUNCTIONS = SimpleNamespace()
_numbers = itertools.count()


def publish(module: nn.Module, function: Callable[..., Any]) -> str:
    """The name by which `FUNCTIONS` has a function, as long as a module lives."""
    known = next((name for name, f in FUNCTIONS.__dict__.items() if f is function), None)
    if known is not None:
        return known
    name = f"plan_{next(_numbers)}"
    setattr(FUNCTIONS, name, function)
    weakref.finalize(module, FUNCTIONS.__dict__.pop, name, None)
    return name


def hold(module: nn.Module, still: Callable[[nn.Module], bool]) -> None:
    """Have the code that is being compiled hold as long as `still(module)`."""
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import Guard, TracingContext

    alive = weakref.ref(module)

    def holds(_: Any) -> bool:
        now = alive()
        return now is not None and still(now)

    def create(builder: Any, guard: Any) -> None:
        builder.guard_manager.root.add_lambda_guard(holds, [_TEXT], guard.user_stack)
        # Code that is compiled for one module is no recompilation of that for another.
        own = [name for name, value in builder.scope["L"].items() if value is alive()]
        builder.id_matched_objs.update(dict.fromkeys(own, alive))

    guards = TracingContext.get().guards_context.dynamo_guards
    guards.add(Guard(GlobalStateSource(), create))


_TEXT = "what a forward that was traced depends on is as it was"
