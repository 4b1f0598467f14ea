"""Conversion in place: a block's class is swapped for its fused subclass.

The module object stays the same, and so do its parameters, hooks and training state: optimizers,
`state_dict`, deepcopy, torch.save and isinstance go on as before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastres.convert.levels import Target, describe
from fastres.convert.report import Report, Row
from fastres.nn.blocks import FusedModule
from fastres.nn.fused import FusedParts, explained, parts_now
from fastres.nn.match import Decline, match
from fastres.nn.stem import FusedStem

#: The module a zoo's models come from -> our file about it, imported once that module is.
ZOOS = {
    "torchvision.models.resnet": "fastres.convert.torchvision",
    "timm.models.resnet": "fastres.convert.timm",
    "timm.models.resnetv2": "fastres.convert.timm_v2",
    "transformers.models.resnet.modeling_resnet": "fastres.convert.transformers",
}

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

Swaps = dict[type, type]


def convert(model: nn.Module) -> Report:
    """Let the residual blocks of a model run fused, in place.

    Blocks of torchvision, timm and transformers are converted; anything else is left as it is.
    Parameters, buffers, names, hooks and results stay; `revert` undoes it. torch.fx,
    torch.jit.trace and torch.export record the stock path; torch.jit.script needs `revert` first.

    Args:
        model: any module; its mode, dtype, device and layout do not matter.

    Returns:
        What was converted, and why the rest was not.

    Raises:
        TypeError: where model is no torch.nn.Module.
    """
    _check(model)
    swaps, changed = _swaps(), 0
    for _, module in _blocks(model, swaps):
        fused = swaps.get(type(module))
        if fused is not None and _permanent_obstacle(module, fused) is None:
            module.__class__ = fused
            changed += 1
    return _report(model, swaps, Target.of(), changed)


def revert(model: nn.Module) -> Report:
    """Give converted blocks their own classes back, in place.

    Blocks that were built as `fastres.nn` blocks stay what they are.

    Args:
        model: what `convert` was given.

    Returns:
        The state of the blocks afterwards.

    Raises:
        TypeError: where model is no torch.nn.Module.
    """
    _check(model)
    swaps, changed = _swaps(), 0
    stocks = {fused: stock for stock, fused in swaps.items()}
    for module in model.modules():
        if type(module) in stocks:
            module.__class__ = stocks[type(module)]
            changed += 1
    return _report(model, swaps, Target.of(), changed)


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
    swaps = _swaps()
    return _report(model, swaps, Target.of(x, device, dtype, channels_last, backend))


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _swaps() -> Swaps:
    """Stock class -> fused class, for the zoos that are loaded: a model can use no other."""
    loaded = [_load(ours) for zoo, ours in ZOOS.items() if zoo in sys.modules]
    return {
        stock: fused
        for swaps in loaded
        if isinstance(swaps, dict)
        for stock, fused in swaps.items()
    }


def _load(ours: str) -> Swaps | str:
    """The swaps of a zoo, or what is wrong with a version of it that we do not know."""
    try:
        swaps: Swaps = importlib.import_module(ours).SWAPS
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"{ours.rpartition('.')[2]} cannot be converted: {error}"
    return swaps


def _blocks(model: nn.Module, swaps: Swaps) -> Iterator[tuple[str, nn.Module]]:
    """The modules worth a row, outermost first: what is inside a fused block is not looked at."""
    skipped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if skipped and name.startswith(skipped):
            continue
        if not _is_known(module, swaps) and not _looks_residual(module):
            continue
        yield name, module
        if isinstance(module, FusedModule):
            skipped = (*skipped, f"{name}." if name else "")


def _is_known(module: nn.Module, swaps: Swaps) -> bool:
    return isinstance(module, (FusedParts, *swaps))


def _looks_residual(module: nn.Module) -> bool:
    children = list(module.children())
    convs = sum(isinstance(child, nn.Conv2d) for child in children)
    norms = sum(isinstance(child, nn.BatchNorm2d) for child in children)
    return convs > 1 and norms > 1 and not isinstance(module, nn.Sequential)


def _obstacle(module: nn.Module, fused: Any) -> Decline | None:
    """What keeps a module from running fused, were it of the class `fused`."""
    matched = match(parts_now(module, fused))
    return matched if isinstance(matched, Decline) else None


def _permanent_obstacle(module: nn.Module, fused: type) -> Decline | None:
    """As `_obstacle`, but for hooks and the like, which a converted block copes with."""
    obstacle = _obstacle(module, fused)
    return obstacle if obstacle is not None and obstacle.permanent else None


def _report(model: nn.Module, swaps: Swaps, target: Target, changed: int = 0) -> Report:
    rows = tuple(_row(name, module, swaps, target) for name, module in _blocks(model, swaps))
    name = type_name(type(model), swaps)
    notes = list(_notes(model, rows))
    if target.why_not_here is not None:
        notes.append(f"this is what would run where it can: {target.why_not_here}")
    return Report(name, rows, changed, tuple(notes))


def _row(name: str, module: nn.Module, swaps: Swaps, target: Target) -> Row:
    kind = type_name(type(module), swaps)
    fused = swaps.get(type(module), type(module))
    kind += " stem" if issubclass(fused, FusedStem) else ""
    if not isinstance(module, FusedParts):
        return Row(name, kind, False, _why_not_converted(module, swaps))
    if (reason := module.why_not()) is not None:
        return Row(name, kind, False, reason)
    matched = module.matched()
    assert matched is not None
    try:
        level, backends = describe(matched, target)
    except NotImplementedError as error:
        return Row(name, kind, False, str(error))
    return Row(name, kind, True, level=level, backends=backends)


def _why_not_converted(module: nn.Module, swaps: Swaps) -> str:
    fused = swaps.get(type(module))
    if fused is not None:
        decline = _obstacle(module, fused)
        return STOCK if decline is None else explained(module, decline)
    for known in swaps:
        if isinstance(module, known):
            return f"a subclass of {type_name(known, swaps)}, whose forward may differ"
    return "not a block that fastres knows"


def type_name(cls: type, swaps: Swaps) -> str:
    """library.Class, for a converted block that of its own library."""
    stock = next((stock for stock, fused in swaps.items() if fused is cls), cls)
    return f"{stock.__module__.split('.')[0]}.{stock.__qualname__}"


def _notes(model: nn.Module, rows: tuple[Row, ...]) -> Iterator[str]:
    if not rows:
        yield "nothing to convert: no residual block of torchvision, timm or transformers in it"
    for zoo, ours in ZOOS.items():
        if zoo in sys.modules and isinstance(problem := _load(ours), str):
            yield problem
    kinds = {type(module).__name__ for module in model.modules()}
    for kind in sorted(kinds & WRAPPERS.keys()):
        yield f"{kind}: {WRAPPERS[kind]}"
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        yield "ScriptModule: scripted modules hold no Python blocks; convert before, not after"
