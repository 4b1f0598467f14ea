"""How many residual blocks and chains modules hold, and what stands outside of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn

from fastres.convert.plan import Plan
from fastres.nn.fused import parts_now
from fastres.nn.match import Parts, is_norm


class Counts(NamedTuple):
    """Residual blocks and chains, each as (fused, all)."""

    blocks: tuple[int, int] = (0, 0)
    chains: tuple[int, int] = (0, 0)


def of_plan(plan: Plan, runs: bool) -> Counts:
    """What a traced module holds.

    A chain is a run without a shortcut; what is left over counts by its additions and norms.
    `runs`: whether its runs are fused as it stands.
    """
    joined = sum([run.parts.shortcut != "none" for run in plan.found.runs])
    others = len(plan.found.runs) - joined
    sums, norms = plan.found.missed
    return Counts((joined * runs, joined + sums), (others * runs, others + norms))


def of_class(module: nn.Module, fused: Any, runs: bool) -> Counts:
    """What a module is that is one of a kind: of a class that runs as a whole, or looks like it."""
    parts = parts_now(module, fused) if hasattr(fused, "_parts") else None
    chain = parts.shortcut == "none" if isinstance(parts, Parts) else not looks_residual(module)
    one = (int(runs), 1)
    return Counts(chains=one) if chain else Counts(blocks=one)


def looks_residual(module: nn.Module) -> bool:
    """Whether a module's children are those of a block: that is all that is known of it."""
    children = list(module.children())
    convs = sum([isinstance(child, nn.Conv2d) for child in children])
    norms = sum([has_norm(child) for child in children])
    return convs > 1 and norms > 1 and not isinstance(module, nn.Sequential)


def has_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm over images."""
    return isinstance(module, nn.BatchNorm2d) or is_norm(module)


def outside(model: nn.Module, rows: Collection[nn.Module]) -> Iterator[str]:
    """What stands in none of the modules that have a row, in sentences.

    Args:
        model: the whole.
        rows: the modules that are told of one by one.
    """
    within = {inner for module in rows if module is not model for inner in module.modules()}
    alone = [m for m in model.modules() if m not in within and m is not model]
    if model not in rows:
        norms = Counter([type(m).__name__ for m in alone if has_norm(m)])
        for kind, count in norms.items():
            yield f"outside of these, {count} {kind} run as they are"
        convs = sum([isinstance(m, nn.Conv2d) for m in alone])
        if convs:
            yield f"outside of these, {convs} Conv2d run as they are"
    other = Counter([type(m).__name__ for m in model.modules() if _is_other_norm(m)])
    for kind, count in other.items():
        yield f"{count} {kind}: only batch norms over images are fused"


def _is_other_norm(module: nn.Module) -> bool:
    if has_norm(module) or isinstance(module, nn.SyncBatchNorm):
        return False
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
