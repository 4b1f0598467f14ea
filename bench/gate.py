"""Parity before speed: a contender whose numbers are not stock torch's gets no time.

On a small batch, in the dtype, layout and mode that are to be timed:

- each kind of fused block alone, on activations as wide as in the network, by the harness' own
  check (`fastres.testing.check_block`): output, every gradient, every buffer within the 2x rule.
  Its norms' biases are moved away from zero, see `_decided`;
- the whole network's output within the 2x rule;
- all its gradients together: the root mean square of their relative errors against float64 may be
  twice the largest of stock torch's own. Not value by value: between a network's input and its
  gradients, rounding decides on which side of zero a few ReLUs are, in each run of stock torch on
  others, and each moves single values by far more than rounding;
- an engine's output by the rule for gradients. OpenVINO's errors are up to 1.6 times torch's, root
  mean square (of eight networks, float32), and the largest of thousands was up to 2.4 times.

Stock torch's own errors are those of the same network as it is and with the batch in other
orders; beside an engine, which chooses its layouts itself, in both layouts. The truth is the same
network in float64. With InPlaceABN the stock network is the one with its leaky ReLUs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres.testing import assert_parity, check_block

from .baselines import leaky_twin
from .contenders import Job
from .engines import EngineError
from .measure import first_line, logits, out_of_memory

#: How a reason starts that has nothing to do with numbers.
CANNOT = "cannot run: "

#: Images, and pixels per side at most: 2x2 pixels of 8 images are left in a ResNet's last stage.
BATCH, SIZE = 8, 64

#: Of a block's activations, by bytes per value: coarse rounding opens more ReLUs, and which ones
#: is luck unless there are many.
BLOCK_SIZES = {4: 8, 2: 16}

#: In standard deviations.
SHIFT = 3.0

#: Stock torch on the batch rolled by so many images: the same terms in other orders.
ROLLS = (0, 1, 2, 3)


def parity_of(job: Job) -> str:
    """Of a job's contender: "ok", or "failed: " and what differs.

    Or `CANNOT` and the reason, for an engine that does not take the network.
    """
    if job.who.stock:
        return "ok"
    small = replace(job, batch=BATCH, size=job.size if job.subject.part else min(job.size, SIZE))
    try:
        with job.settings(), _without_tf32():
            _check(small)
    except EngineError as error:
        return f"{CANNOT}{first_line(error)}"
    except Exception as error:  # one that crashes is as wrong as one that is off
        if out_of_memory(error):
            raise
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return f"failed: {kind}{first_line(error)}"
    return "ok"


def _check(job: Job) -> None:
    stock, module = job.stock(), job.module()
    if job.contender.startswith("inplace_abn"):
        leaky_twin(stock)
    for each in (stock, module):
        _without_chance(each)
    x = job.place(job.subject.input(seed=7))
    if job.who.fused:
        _check_blocks(job, stock, module, x)
    target = None
    if not job.subject.part:
        classes = logits(copy.deepcopy(stock)(x)).shape[1]
        target = torch.arange(len(x), device=x.device) % classes
    run = _Run(job, target)
    truth = run(copy.deepcopy(stock).double(), x.double())
    stocks = _stocks(job, stock, x, run)
    results = run(module, x)
    if job.who.engine is None:
        assert_parity(
            results.pop("out"), truth.pop("out"), [s.pop("out") for s in stocks],
            what="the output", pool="tensor",
        )  # fmt: skip
    if truth:
        error, allowed = _distance(results, truth), 2 * max(_distance(s, truth) for s in stocks)
        if not error <= allowed:
            what = "the gradients" if job.who.engine is None else "the output"
            raise AssertionError(
                f"{what}: {error:.2e} from the truth, relative root mean square; "
                f"allowed {allowed:.2e}"
            )


def _stocks(job: Job, stock: nn.Module, x: Tensor, run: _Run) -> list[dict[str, Tensor]]:
    """Stock torch's own results, in several orders of the batch and the contender's layouts."""
    both = [torch.contiguous_format, torch.channels_last]
    results = []
    for layout in both if job.who.engine is not None else [job.memory_format]:
        module = copy.deepcopy(stock).to(memory_format=layout)  # type: ignore[call-overload]
        placed = x.contiguous(memory_format=layout)
        results += [run(copy.deepcopy(module), placed, roll) for roll in ROLLS]
    return results


class _Run:
    """Forward, and in training loss and backward: the output and every gradient."""

    def __init__(self, job: Job, target: Tensor | None) -> None:
        self._job, self._target = job, target

    def __call__(self, module: nn.Module, x: Tensor, roll: int = 0) -> dict[str, Tensor]:
        x = x.roll(roll, 0)
        training = self._job.mode == "train"
        with torch.set_grad_enabled(training), self._job.autocast():
            out = logits(module(x))
        results = {"out": out.detach().roll(-roll, 0)}
        if not training:
            return results
        self._loss(out, roll).backward()
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        return results | grads

    def _loss(self, out: Tensor, roll: int) -> Tensor:
        if self._target is not None:
            return F.cross_entropy(out, self._target.roll(roll, 0))
        generator = torch.Generator().manual_seed(0)
        grad = torch.randn(out.shape, generator=generator).to(out.device).roll(roll, 0)
        return (out * grad.to(out.dtype)).sum()


def _distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Root mean square over the parameters of their gradients' relative errors (L2)."""
    if found.keys() != truth.keys():
        raise AssertionError(f"gradients must be of {sorted(truth)}, got {sorted(found)}")
    squares = [
        float((found[n].double() - t).square().sum() / t.square().sum().clamp_min(1e-300))
        for n, t in truth.items()
    ]
    return math.sqrt(sum(squares) / len(squares))


def _check_blocks(job: Job, stock: nn.Module, module: nn.Module, x: Tensor) -> None:
    """Every kind of fused block; of several that differ in their weights alone, the first."""
    names = [row.name for row in fastres.explain(module).rows if row.fused]
    modules, fused = dict(stock.named_modules()), dict(module.named_modules())
    kinds = {repr(modules[name]): name for name in reversed(names) if name}
    inputs = {"": x} if job.subject.part else _inputs(stock, list(kinds.values()), x, job)
    for name, block_input in inputs.items():
        block_input = block_input.requires_grad_(job.mode == "train")
        pair = _decided(modules[name]), _decided(fused[name])
        with torch.set_grad_enabled(job.mode == "train"), job.autocast():
            check_block(*pair, block_input, what=name or "the block")


def _decided(block: nn.Module) -> nn.Module:
    """A copy whose ReLUs are given values around `SHIFT` or -`SHIFT`, channel by channel.

    Around zero, where a trained network has them, one of a million values lies within float32's
    rounding of zero: it is open in one run and not in another, and the gradient of its whole
    channel is another. Three standard deviations away that is a hundred times as rare.
    """
    block = copy.deepcopy(block)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.affine:
                weight = torch.rand(norm.num_features, generator=generator) + 0.5
                sign = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
                norm.weight.copy_(weight)
                norm.bias.copy_(SHIFT * sign * weight)
    return block


def _inputs(stock: nn.Module, names: list[str], x: Tensor, job: Job) -> dict[str, Tensor]:
    """Activations such as blocks get in a network, of `BLOCK_SIZES` pixels per side."""
    seen: dict[str, Tensor] = {}
    size = BLOCK_SIZES[job.compute_dtype.itemsize]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            small = args[0].detach()
            wide = small.new_empty(BATCH, small.shape[1], size, size)
            seen[name] = wide.contiguous(memory_format=job.memory_format).normal_().relu_()

        return hook

    model = copy.deepcopy(stock)
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    torch.manual_seed(0)
    with torch.no_grad(), job.autocast():
        model(x)
    return seen


def _without_chance(model: nn.Module) -> None:
    """No dropout, of values or of whole branches: no two runs drop the same."""
    for module in model.modules():
        if type(module).__name__.startswith(("Dropout", "StochasticDepth")):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0


@contextmanager
def _without_tf32() -> Iterator[None]:
    """TF32 is no float32."""
    parts = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = False
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.allow_tf32 = value
