"""Which modules of a model are to be bound to what their forwards were traced to compute."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fastres.convert.plan import Plan
from fastres.convert.trace import NotTraced
from fastres.convert.traced import Traced, bound_plan, first_plan, stock_of, traced_class
from fastres.nn import factors
from fastres.nn.blocks import FusedModule
from fastres.nn.fused import FusedParts, explained, parts_now
from fastres.nn.match import Parts, is_norm


class Survey(NamedTuple):
    """What the forwards of a model's modules were found to compute.

    Attributes:
        bound: modules with runs of their own, outermost first, which are not looked into by
            another of them.
        failed: why others have none.
    """

    bound: dict[nn.Module, Plan]
    failed: dict[nn.Module, NotTraced]


Known = Mapping[nn.Module, type]


def survey(model: nn.Module, known: Known) -> Survey:
    """Trace what may hold runs, innermost first.

    Args:
        model: nothing about it is changed.
        known: modules that are not traced, because a zoo's file has a class for them: which one.
    """
    modules = _outside(model, known)
    plans: dict[nn.Module, Plan] = {}
    failed: dict[nn.Module, NotTraced] = {}
    apart = {m for m in modules if isinstance(m, FusedParts) or m in known}
    for module in reversed(modules):
        if module in apart:
            continue
        inner = [child for child in module.children() if child in apart]
        blocks = False
        if _may_hold_runs(module, apart):
            plan = _plan_of(module, apart, plans)
            if isinstance(plan, NotTraced):
                failed[module] = plan
            elif plan.found.runs:
                plans[module] = plan
                blocks = plan.holds_blocks
            else:
                failed[module] = NotTraced(module, _nothing(module, plan))
        if inner or blocks:
            apart.add(module)
    return Survey(_outermost(modules, plans), failed)


def _plan_of(
    module: nn.Module, apart: Collection[nn.Module], plans: Mapping[nn.Module, Plan]
) -> Plan | NotTraced:
    if isinstance(module, Traced):
        return bound_plan(module)
    if "forward" in module.__dict__:
        return NotTraced(module, "has its forward replaced")
    plan = first_plan(module, apart, plans.__contains__)
    if isinstance(plan, Plan) and plan.found.runs:
        try:
            traced_class(type(module))
        except Exception as error:
            return NotTraced(module, f"is of a class without subclasses: {error}")
    return plan


def _nothing(module: nn.Module, plan: Plan) -> str:
    declines = [explained(module, decline) for decline in plan.found.declines]
    return declines[0] if declines else "holds nothing that is fused"


def _outside(model: nn.Module, known: Known) -> list[nn.Module]:
    """A model's modules, outermost first, without those inside of what is not traced."""
    hidden: set[nn.Module] = set()
    for module in model.modules():
        cls: Any = known.get(module, type(module))
        if issubclass(cls, FusedModule):
            hidden.update(inner for inner in module.modules() if inner is not module)
        elif issubclass(cls, FusedParts) and isinstance(parts := parts_now(module, cls), Parts):
            hidden.update(m for part in parts.wrappers if part is not None for m in part.modules())
    return [module for module in model.modules() if module not in hidden]


def _outermost(modules: Iterable[nn.Module], plans: dict[nn.Module, Plan]) -> dict[nn.Module, Plan]:
    bound: dict[nn.Module, Plan] = {}
    inside: set[nn.Module] = set()
    for module in modules:
        if module in plans and module not in inside:
            bound[module] = plans[module]
            inside.update(plans[module].inside)
    return bound


def _may_hold_runs(module: nn.Module, apart: Collection[nn.Module]) -> bool:
    """Whether a module's forward is the user's, and there is a norm that it may call."""
    cls = stock_of(module)
    # FSDP2 puts classes of its own in front of the user's.
    own = next(c for c in cls.__mro__ if not c.__module__.startswith("torch.distributed"))
    home = own.__module__.split(".")[0]
    if home in ("torch", "fastres") and not isinstance(module, nn.Sequential):
        return False
    if isinstance(module, torch.jit.ScriptModule) or cls.forward is nn.Module.forward:
        return False
    if factors.drop_of(module) or factors.gate_of(module) or is_norm(module):
        return False
    return any([_holds_norm(child, apart) for child in module.children()])


def _holds_norm(module: nn.Module, apart: Collection[nn.Module]) -> bool:
    if module in apart:
        return False
    if isinstance(module, nn.BatchNorm2d) or is_norm(module):
        return True
    return any([_holds_norm(child, apart) for child in module.children()])
