"""`fastres bench coverage`: how much of many networks is recognised, and whether it is right.

Writes docs/coverage.md. What there is to fuse is counted on the network as its library has it
(`bench.dataflow`), what is fused on the converted copy, by what its fused blocks were given.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastres
from fastres.cli.errors import CommandError

from .conditions import ROOT
from .dataflow import is_norm, pairs, record, residuals, same_mark
from .zoo import SIZE, ZOO

PAGE = ROOT.parent / "docs" / "coverage.md"
#: Reasons that are shown of one network, the most frequent ones.
REASONS = 3


@dataclass(frozen=True)
class Coverage:
    """What was found of one network.

    Attributes:
        name: of `bench.zoo.ZOO`.
        blocks: residual blocks that were fused wholly, and all.
        pairs: convolutions with their norm that were fused, and all.
        error: largest difference of an output, gradient or buffer, in float64, over one step of
            training and one evaluation, relative to the largest output, gradient or buffer.
        reasons: for what is not fused.
        seconds: that conversion took.
    """

    name: str
    blocks: tuple[int, int]
    pairs: tuple[int, int]
    error: float
    reasons: tuple[str, ...]
    seconds: float


def main(arguments: Sequence[str]) -> int:
    """Measure and write the page, or with --only print the table of some networks.

    Returns: 1 where a converted network is wrong, else 0.

    Raises:
        CommandError: for a name that no network has.
    """
    parser = argparse.ArgumentParser(prog="fastres bench coverage", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME",
        help="measure networks with this in their name; the others' rows stay")  # fmt: skip
    options = parser.parse_args(arguments)
    names = [n for n in ZOO if not options.only or any(part in n for part in options.only)]
    if not names:
        raise CommandError(f"--only must be in one of {', '.join(ZOO)}")
    if not PAGE.parent.is_dir():
        raise CommandError(f"docs/ must be beside bench/, got none at {PAGE.parent}")
    rows = rows_of(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}
    wrong = 0
    for name in names:
        found = cover(name)
        rows[name] = found
        wrong += found.error > allowed(name)
        print(
            line(found).strip(), f"converted in {found.seconds:.2f} s", file=sys.stderr, flush=True
        )
        known = [rows[one] for one in ZOO if one in rows]
        PAGE.write_text(page(known), encoding="utf-8")
    return int(wrong > 0)


#: Between steps that differ in the order of sums alone, in float64. A sum of 2^20 terms is off by
#: 2^10 roundings; batch norms of two images amplify that by the inverse of their deviations, some
#: 2^5 for each of the last ones.
ALLOWED = 2**-52 * 2**10 * 2**15
#: How much networks differ from themselves in the other memory format, where that is more: the
#: attention of a ResNeSt normalises two values, which amplifies by up to eps**-0.5 each time.
OWN = {"timm:resnest50d": 2.4e-7}


def allowed(name: str) -> float:
    """The largest error of a network: the usual one, or twice what stock torch's own is."""
    return max(ALLOWED, 2 * OWN.get(name, 0.0))


def cover(name: str) -> Coverage:
    """Build a network twice, convert one, run both and compare."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = randomised(ZOO[name]()).double().train()
        fused = copy.deepcopy(stock)
        begin = time.perf_counter()
        report = fastres.convert(fused)
        seconds = time.perf_counter() - begin
        blocks, chains = _counts(copy.deepcopy(stock), copy.deepcopy(fused))
        error = max(_errors(stock, fused))
    whole = blocks[0] == blocks[1] and chains[0] == chains[1]
    reasons = Counter(row.reason for row in report.rows if row.reason and not whole)
    shown = tuple([f"{n} x {text}" for text, n in reasons.most_common(REASONS)])
    return Coverage(name, blocks, chains, error, shown, seconds)


def randomised(model: nn.Module) -> nn.Module:
    """With batch norms whose parameters and statistics tell mistakes apart."""
    for module in model.modules():
        if is_norm(module):
            with torch.no_grad():
                for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
                    if (t := getattr(module, name)) is not None:
                        t.uniform_(low, low + 1)
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return model


def images() -> Tensor:
    """What networks are run on."""
    return torch.randn(
        2, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def _counts(stock: nn.Module, fused: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Residual blocks and pairs of convolution and norm, each as (fused, all), in training."""
    x = images()
    torch.manual_seed(2)
    before = record(lambda: stock(x), modules=True)
    torch.manual_seed(2)
    after = record(lambda: fused(x), modules=False)
    twins = dict(zip(stock.modules(), fused.modules(), strict=True))
    units, tensors = {id(t) for t in after.units}, {id(t) for t in after.tensors}
    sums = [step.mark for step in after.steps if step.mark]

    def normed(norm: nn.Module) -> bool:
        names = ("weight", "bias", "running_var")
        return any([id(getattr(twins[norm], name)) in tensors for name in names])

    all_pairs, all_blocks = pairs(before), residuals(before)
    whole = [
        block
        for block in all_blocks
        if all([normed(norm) for norm in block.norms])
        and not any([same_mark(mark, other) for mark in block.marks for other in sums])
    ]
    fused_pairs = [1 for conv, _ in all_pairs if id(twins[conv].weight) in units]
    return (len(whole), len(all_blocks)), (len(fused_pairs), len(all_pairs))


def _errors(stock: nn.Module, fused: nn.Module) -> Iterable[float]:
    """Relative to the largest value of its kind: outputs, gradients, buffers."""
    for train in (True, False):
        ours, theirs = [step(model.train(train)) for model in (fused, stock)]
        for mine, right in zip(ours, theirs, strict=True):
            largest = max([float(t.abs().max()) for t in right if t.numel()] or [1.0])
            for a, b in zip(mine, right, strict=True):
                if a.numel():
                    yield float((a - b).abs().max()) / (largest or 1.0)


def step(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, gradients and buffers of one forward and, in training, one backward."""
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(model.training):
        outputs = [t for t in pytree.tree_leaves(_plain(model(images()))) if _is_real(t)]
        if model.training:
            sum([(t * torch.sin(_ramp(t))).sum() for t in outputs if t.requires_grad]).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    buffers = [b.detach().double().clone() for b in model.buffers()]
    return [t.detach() for t in outputs], grads, buffers


def _plain(out: Any) -> Any:
    """What transformers' models return is a dictionary of a class of theirs."""
    return dict(out) if hasattr(out, "items") else out


def _is_real(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _ramp(t: Tensor) -> Tensor:
    return torch.arange(t.numel(), dtype=t.dtype).view(t.shape)


# ---------------------------------------------------------------- the page

HEAD = """# What is recognised

Written by `fastres bench coverage`: each network is built with random weights, copied, and the
copy converted; then both make one training step and one evaluation on two images of {size}x{size},
in float64.

What there is to fuse is counted on the network as its library has it, without regard to what
fastres recognises: every operator of one training run is seen below autograd, with the modules
that called it.

- A *pair* is a convolution and the batch norm, frozen or not, that reads its output.
- A *residual block* is a module whose own forward adds two activations of the same shape that come
  from one value, or from its arguments: one through a convolution and a batch norm, the shortcut
  through linear operators alone (convolution, norm, pooling, padding, slicing). An addition on the
  other side of which another module's block stands, as in a feature pyramid, is none.

A pair is fused where a fused operation was given the convolution's weight together with a norm. A
block is fused where all norms on both of its ways went into fused operations, and torch was never
asked for its sum. *Error* is the largest difference of any output, gradient or buffer, relative to
the largest output, gradient or buffer; stock torch differs from itself by as much in another memory
format, in the worst case, timm's resnest50d, by 2e-07.

**{blocks} of {all_blocks} residual blocks ({share:.0%}) and {pairs} of {all_pairs} pairs
({pair_share:.0%}) are fused.**

| network | residual blocks | pairs | error | what is in the way of the rest |
|---|---|---|---|---|
"""


def page(found: Sequence[Coverage]) -> str:
    """docs/coverage.md."""
    blocks, all_blocks = (sum(one.blocks[i] for one in found) for i in (0, 1))
    fused, every = (sum(one.pairs[i] for one in found) for i in (0, 1))
    head = HEAD.format(
        size=SIZE, blocks=blocks, all_blocks=all_blocks, share=blocks / max(all_blocks, 1),
        pairs=fused, all_pairs=every, pair_share=fused / max(every, 1),
    )  # fmt: skip
    return head + "".join([line(one) for one in found])


def line(one: Coverage) -> str:
    """The row of a network."""
    blocks, chains = [f"{a} / {b}" if b else "-" for a, b in (one.blocks, one.pairs)]
    return f"| {one.name} | {blocks} | {chains} | {one.error:.0e} | {'; '.join(one.reasons)} |\n"


def rows_of(text: str) -> dict[str, Coverage]:
    """The networks of a page, by name."""
    found = {}
    for cells in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (\S+) \| (.*)\|$", text, re.M):
        name, blocks, chains, error, reasons = cells
        if name in ZOO:
            shown = tuple(reasons.strip().split("; ")) if reasons.strip() else ()
            counts = [_counts_in(cell) for cell in (blocks, chains)]
            found[name] = Coverage(name, counts[0], counts[1], float(error), shown, 0.0)
    return found


def _counts_in(cell: str) -> tuple[int, int]:
    some, _, every = cell.partition(" / ")
    return (int(some), int(every)) if every else (0, 0)
