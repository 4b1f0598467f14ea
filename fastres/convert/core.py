"""Conversion in place: a block's class is swapped for its fused subclass.

The module object stays the same, and so do its parameters, hooks and training state: optimizers,
`state_dict`, deepcopy, torch.save and isinstance go on as before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastres.block.check import why_not_settings
from fastres.convert.count import has_norm, looks_residual, of_class, of_plan, outside
from fastres.convert.frozen import learn
from fastres.convert.grammar import match_run
from fastres.convert.levels import Target, describe
from fastres.convert.plan import Plan, why_not_whole
from fastres.convert.report import Report, Row
from fastres.convert.survey import Survey, survey
from fastres.convert.swaps import BUILT, ZOOS, Swaps, load
from fastres.convert.swaps import swaps as known_swaps
from fastres.convert.traced import Traced, bind, reverted, stock_of, why_not_traced
from fastres.nn.blocks import FusedModule
from fastres.nn.fused import FusedParts, explained, parts_now
from fastres.nn.match import Decline, match
from fastres.nn.stem import FusedStem

#: Wrappers of a whole model that a user may wonder about.
WRAPPERS = {
    "OptimizedModule": "the compiled model inside is meant; it compiles anew on its next call",
    "DistributedDataParallel": "the model inside is meant; buckets and hooks stay",
    "DataParallel": "the model inside is meant; its replicas follow on the next call",
    "FullyShardedDataParallel": "the model inside is meant; flattened parameters stay",
    "SyncBatchNorm": "its statistics span processes: such blocks run as they are",
    "GraphModule": "a traced graph calls the children one by one; convert before tracing",
}

#: What is said of a block that `convert` would change.
STOCK = "not converted"


def convert(model: nn.Module) -> Report:
    """Let the residual blocks of a model, and its chains with batch norms, run fused, in place.

    Blocks of torchvision, timm and transformers are known; the forwards of all other modules are
    traced by torch.fx, and what is found in them to be fused is fused, the rest being run as it
    was written. Parameters, buffers, names, hooks and results stay; `revert` undoes it. torch.fx,
    torch.jit.trace and torch.export record the stock path; torch.jit.script needs `revert` first.
    An exception leaves the model as it was.

    Args:
        model: any module; its mode, dtype, device and layout do not matter.

    Returns:
        What was converted, and why the rest was not.

    Raises:
        TypeError: where model is no torch.nn.Module.
    """
    _check(model)
    learn(model)
    swaps = known_swaps()
    found = _survey(model, swaps)
    classes = {module: type(module) for module in model.modules()}
    try:
        for module in _convertible(model, swaps):
            module.__class__ = swaps[type(module)]
        for module, plan in found.bound.items():
            if not isinstance(module, Traced):
                bind(module, plan)
        for plan in found.bound.values():
            plan.guard.settle()
    except BaseException:
        for module, cls in classes.items():
            module.__class__ = cls
        raise
    changed = sum([type(module) is not cls for module, cls in classes.items()])
    return _report(model, swaps, Target.of(), changed, found)


def revert(model: nn.Module, *, built: bool = False) -> Report:
    """Give converted blocks their own classes back, in place.

    Args:
        model: what `convert` was given; FSDP2 may have wrapped it before or since.
        built: whether blocks that were built as `fastres.nn` blocks become those of
            `fastres.nn.stock`, with torch's own modules; else they stay what they are. `convert`
            knows these too.

    Returns:
        The state of the blocks afterwards.

    Raises:
        TypeError: where model is no torch.nn.Module.
    """
    _check(model)
    learn(model)
    swaps, changed = known_swaps(), 0
    stocks = {fused: own for own, fused in swaps.items() if built or own not in BUILT}
    left: dict[str, None] = {}
    for module in model.modules():
        stock = reverted(type(module), stocks)
        if stock is not type(module):
            module.__class__ = stock
            changed += 1
        elif any([cls in stocks for cls in stock.__mro__]):
            left[stock.__name__] = None
    report = _report(model, swaps, Target.of(), changed)
    notes = [f"{name}: a subclass of a fused block, whose methods call super: it stays one"
             for name in left]  # fmt: skip
    return replace(report, notes=(*report.notes, *notes))


def explain(
    model: nn.Module,
    x: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
    backend: str | None = None,
) -> Report:
    """Say which blocks of a model run fused, by which kernels, and why the others do not.

    Nothing is computed and nothing is changed.

    Args:
        model: any module.
        x: an example input; its device, dtype and layout are used where they are not given.
        device: where the model is to run; its parameters' device by default.
        dtype: of the activations; that of the parameters by default.
        channels_last: layout of the activations; that of the parameters by default.
        backend: as for `fastres.use_backend`; the one in force by default.

    Returns:
        One row per block.

    Raises:
        TypeError: where model is no torch.nn.Module.
        ValueError: for an unknown backend. For one that cannot run on this machine the report says
            what it would do on one where it can, and notes that.
    """
    _check(model)
    learn(model)
    swaps = known_swaps()
    return _report(model, swaps, Target.of(x, device, dtype, channels_last, backend))


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _survey(model: nn.Module, swaps: Swaps) -> Survey:
    """What tracing finds in the modules that no zoo's file knows."""
    known = {module: swaps[type(module)] for module in _convertible(model, swaps)}
    return survey(model, known)


def _convertible(model: nn.Module, swaps: Swaps) -> list[nn.Module]:
    """The modules whose class is to be swapped for the one that a zoo's file has for it.

    What is inside a zoo's block is left to whatever runs the block: by its class or by tracing.
    """
    found, hidden = [], set[nn.Module]()
    for module in model.modules():
        fused = swaps.get(type(module))
        if module in hidden or _leaves_inside(module, swaps):
            continue
        if fused is not None and _permanent_obstacle(module, fused) is None:
            found.append(module)
        if issubclass(fused or type(module), FusedModule):
            hidden.update(inner for inner in module.modules() if inner is not module)
    return found


def _blocks(model: nn.Module, swaps: Swaps, found: Survey) -> Iterator[tuple[str, nn.Module]]:
    """The modules worth a row, outermost first: what is inside a fused block is not looked at."""
    skipped: tuple[str, ...] = ()
    inside = {module for plan in found.bound.values() for module in plan.inside}
    for name, module in model.named_modules():
        if (skipped and name.startswith(skipped)) or module in inside:
            continue
        if _leaves_inside(module, swaps):
            continue
        known = _is_known(module, swaps) or module in found.bound
        missed = module in found.failed and _has_norms(module)
        if not known and not missed and not looks_residual(module):
            continue
        yield name, module
        if isinstance(module, FusedModule):
            skipped = (*skipped, f"{name}." if name else "")


def _leaves_inside(module: nn.Module, swaps: Swaps) -> bool:
    """Whether it is of a class that is fused around a child, and this one is left to its child."""
    fused: Any = swaps.get(type(module))
    wraps = fused is not None and fused._wraps
    return wraps and _permanent_obstacle(module, fused) is not None


def _is_known(module: nn.Module, swaps: Swaps) -> bool:
    return isinstance(module, FusedParts) or type(module) in swaps


def _has_norms(module: nn.Module) -> bool:
    return any([has_norm(child) for child in module.children()])


def _obstacle(module: nn.Module, fused: Any) -> Decline | None:
    """What keeps a module from running fused, were it of the class `fused`."""
    matched = match(parts_now(module, fused))
    return matched if isinstance(matched, Decline) else None


def _permanent_obstacle(module: nn.Module, fused: type) -> Decline | None:
    """As `_obstacle`, but for hooks and the like, which a converted block copes with."""
    obstacle = _obstacle(module, fused)
    return obstacle if obstacle is not None and obstacle.permanent else None


def _report(
    model: nn.Module, swaps: Swaps, target: Target, changed: int = 0, found: Survey | None = None
) -> Report:
    found = found or _survey(model, swaps)
    modules = dict(_blocks(model, swaps, found))
    rows = tuple([_counted(name, m, swaps, target, found) for name, m in modules.items()])
    name = type_name(type(model), swaps)
    notes = [*outside(model, modules.values()), *_notes(model, rows)]
    if target.why_not_here is not None:
        notes.append(f"this is what would run where it can: {target.why_not_here}")
    return Report(name, rows, changed, tuple(notes))


def _counted(name: str, module: nn.Module, swaps: Swaps, target: Target, found: Survey) -> Row:
    """The row of a module, with what it holds."""
    row, plan = _row(name, module, swaps, target, found), found.bound.get(module)
    if plan is not None:
        counts = of_plan(plan, row.fused or row.runs > 0)
    else:
        counts = of_class(module, swaps.get(stock_of(module), type(module)), row.fused)
    return replace(row, blocks=counts.blocks, chains=counts.chains)


def _row(name: str, module: nn.Module, swaps: Swaps, target: Target, found: Survey) -> Row:
    kind = type_name(type(module), swaps)
    fused = swaps.get(stock_of(module), type(module))
    kind += " stem" if issubclass(fused, FusedStem) else ""
    if (plan := found.bound.get(module)) is not None:
        row = _traced_row(Row(name, kind, False), module, plan, target)
        if row.reason and fused is not type(module):
            decline = _obstacle(module, fused)
            return row if decline is None else replace(row, reason=explained(module, decline))
        return row
    if not isinstance(module, FusedParts):
        return Row(name, kind, False, _why_not_converted(module, swaps, found))
    if (reason := module.why_not()) is not None:
        return Row(name, kind, False, reason)
    matched = module.matched()
    assert matched is not None
    try:
        level, backends = describe(matched, target)
    except NotImplementedError as error:
        return Row(name, kind, False, str(error))
    return Row(name, kind, True, level=level, backends=backends)


def _traced_row(row: Row, module: nn.Module, plan: Plan, target: Target) -> Row:
    """The row of a module that was traced, whose runs are all fused, and perhaps not all of it."""
    if not isinstance(module, Traced):
        return replace(row, reason=STOCK)
    if (reason := why_not_traced()) is not None:
        return replace(row, reason=reason)
    levels: dict[str, None] = {}
    backends: dict[str, dict[str, None]] = {}
    for run in plan.found.runs:
        matched = match_run(run)
        if isinstance(matched, Decline):
            return replace(row, reason=explained(module, matched))
        reasons = [why_not_settings(unit) for unit in matched.block.all_units]
        if (reason := next(filter(None, reasons), None)) is not None:
            return replace(row, reason=reason)
        try:
            level, own = describe(matched, target)
        except NotImplementedError as error:
            return replace(row, reason=str(error))
        levels[level] = None
        for primitive, which in own.items():
            backends.setdefault(primitive, {})[which] = None
    joined = {primitive: ", ".join(which) for primitive, which in backends.items()}
    reason = why_not_whole(module, plan)
    return replace(
        row, fused=not reason, reason=reason, level=", ".join(levels), backends=joined,
        runs=len(plan.found.runs),
    )  # fmt: skip


def _why_not_converted(module: nn.Module, swaps: Swaps, found: Survey) -> str:
    fused = swaps.get(type(module))
    failed = found.failed.get(module)
    if fused is not None:
        decline = _obstacle(module, fused)
        if decline is None:
            return STOCK
        return explained(module, decline) if decline.permanent or failed is None else failed.text
    return "not a block that fastres knows" if failed is None else failed.text


def type_name(cls: type, swaps: Swaps) -> str:
    """library.Class, for a converted block that of its own library."""
    stock = next((stock for stock, fused in swaps.items() if fused is cls), None)
    stock = stock or getattr(cls, "_fastres_stock", None) or cls
    return f"{stock.__module__.split('.')[0]}.{stock.__qualname__}"


def _notes(model: nn.Module, rows: tuple[Row, ...]) -> Iterator[str]:
    if not rows:
        yield "nothing to convert: no residual block in it, and no batch norm to be fused"
    for zoo, ours in ZOOS.items():
        if zoo in sys.modules and isinstance(problem := load(ours), str):
            yield problem
    kinds = {type(module).__name__ for module in model.modules()}
    for kind in sorted(kinds & WRAPPERS.keys()):
        yield f"{kind}: {WRAPPERS[kind]}"
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        yield "ScriptModule: scripted modules hold no Python blocks; convert before, not after"
