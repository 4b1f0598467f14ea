"""What every implementation of `update_running` is held to: nn.BatchNorm2d, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from fastres.kernels import RunningUpdate, reference

Run = Callable[[Sequence[RunningUpdate]], None]

F64 = torch.float64
MOMENTA = (0.1, 0.0, 1.0, -0.5, None)
#: Of the statistics of the batch, of the running mean and of the running variance.
DTYPES = (
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16, torch.float32),
    (torch.float32, torch.float32, torch.float64),
    (torch.float64, torch.float64, torch.float64),
    (torch.float64, torch.bfloat16, torch.float32),
)


class Norm:
    """An nn.BatchNorm2d in float64, and the buffers that are to follow it."""

    def __init__(
        self,
        channels: int = 5,
        dtypes: Sequence[torch.dtype] = DTYPES[0],
        momentum: float | None = 0.1,
        counted: bool = True,
        stride: int = 1,
        device: str = "cpu",
    ) -> None:
        self.stock = nn.BatchNorm2d(channels, momentum=momentum, dtype=F64)
        self.stock.num_batches_tracked = torch.tensor(3) if counted else None
        self.stats_dtype, *others = dtypes
        self.mean, self.var = (
            torch.full((channels, stride), 7.0, dtype=t, device=device)[:, 0] for t in others
        )
        self.mean.copy_(torch.randn(channels))
        self.var.copy_(torch.rand(channels) + 0.5)
        self.counter = torch.tensor(3, device=device) if counted else None
        self.momentum = momentum
        self.device = device

    def update(self, x: Tensor) -> RunningUpdate:
        """What the batch x, in float64 on the CPU, asks for."""
        count = x.numel() // x.shape[1]
        state = reference.channel_stats(x)
        stats = reference.finalize_stats(state, count, None, None, None, 1e-5)
        stats = stats.to(self.device, self.stats_dtype)
        return RunningUpdate(stats, self.mean, self.var, self.counter, self.momentum, count)

    def follow(self, *batches: Tensor) -> None:
        """Let the stock norm take in the batches, from the buffers as they are."""
        self.stock.running_mean.copy_(self.mean)
        self.stock.running_var.copy_(self.var)
        for x in batches:
            self.stock(x)

    def check(self) -> None:
        """The buffers against the stock norm's: one rounding apart, and that of the statistics."""
        for found, expected in (
            (self.mean, self.stock.running_mean),
            (self.var, self.stock.running_var),
        ):
            size = 1.01 * torch.finfo(found.dtype).eps / 2 + 4 * torch.finfo(self.stats_dtype).eps
            # A float32 between float64 and 16 bits rounds once more.
            size += torch.finfo(torch.float32).eps * (found.dtype != F64)
            torch.testing.assert_close(found.cpu().to(F64), expected, rtol=size, atol=4 * size)
        if self.counter is not None:
            assert self.counter.item() == self.stock.num_batches_tracked.item()

    def padding(self) -> Tensor:
        """What lies between the elements of strided buffers."""
        return torch.cat([t._base[:, 1:].flatten().to(F64) for t in (self.mean, self.var)])


def batch(channels: int = 5, count: int = 12) -> Tensor:
    """A batch in float64, with as many values per channel."""
    return torch.randn(count // 2, channels, 1, 2, dtype=F64) * 2 + 1


def cases() -> Iterator[tuple[float | None, bool, Sequence[torch.dtype]]]:
    """Momentum, whether there is a counter, dtypes."""
    return product(MOMENTA, (True, False), DTYPES)


def check_steps(run: Run, device: str, steps: int = 3) -> None:
    """Every momentum, with and without counter, in every mix of dtypes, of three norms at once."""
    for momentum, counted, dtypes in cases():
        norms = [Norm(c, dtypes, momentum, counted, device=device) for c in (5, 1, 300)]
        for _ in range(steps):
            _step(run, norms, [batch(len(n.mean)) for n in norms])


def _step(run: Run, norms: Sequence[Norm], batches: Sequence[Tensor]) -> None:
    for norm, x in zip(norms, batches, strict=True):
        norm.follow(x)
    run([norm.update(x) for norm, x in zip(norms, batches, strict=True)])
    for norm in norms:
        norm.check()


def check_shared(run: Run, device: str) -> None:
    """The same buffers several times in one list: all batches count, in their order."""
    for momentum, dtypes in product((0.25, None), (DTYPES[0], DTYPES[4])):
        for channels, times in ((5, 2), (300, 10)):
            norm, other = (Norm(channels, dtypes, momentum, device=device) for _ in range(2))
            batches = [batch(channels) * (i + 1) for i in range(times)]
            norm.follow(*batches)
            other.follow(batches[0])
            updates = [norm.update(x) for x in batches]
            run([*updates[:1], other.update(batches[0]), *updates[1:]])
            norm.check()
            other.check()


def check_layouts(run: Run, device: str) -> None:
    """Strided buffers and statistics, a batch of two values, buffers that are not there."""
    for momentum, dtypes in product((0.1, None), DTYPES):
        norm = Norm(37, dtypes, momentum, stride=3, device=device)
        before = norm.padding()
        for x in (batch(37), batch(37, 2)):
            _step(run, [norm], [x])
        assert torch.equal(norm.padding(), before)
        x = batch(37)
        norm.follow(x)
        update = norm.update(x)
        wide = torch.zeros(37, 10, dtype=update.stats.dtype, device=device).t()[::2]
        run([update._replace(stats=wide.copy_(update.stats))])
        norm.check()
    norm = Norm(device=device)
    mean, var, counter = norm.mean.clone(), norm.var.clone(), norm.counter.clone()
    norm.follow(x := batch())
    run([norm.update(x)._replace(running_mean=None)])
    assert torch.equal(norm.mean, mean) and not torch.equal(norm.var, var)
    assert norm.counter == counter + 1
    var = norm.var.clone()
    run([norm.update(x)._replace(running_mean=None, running_var=None)])
    assert torch.equal(norm.var, var) and norm.counter == counter + 2
    run([])


def check_special_values(run: Run, device: str) -> None:
    """NaN and infinities spread as in torch, which multiplies them by a factor of zero too."""
    for momentum in (0.0, 1.0, 0.5):
        norm = Norm(4, momentum=momentum, device=device)
        norm.mean[1] = torch.inf
        x = batch(4)
        x[0, 0], x[0, 2] = torch.nan, -torch.inf
        norm.follow(x)
        update = norm.update(x)
        update.stats[0, 2] = -torch.inf  # by a sum, as torch has it
        run([update])
        expected = [norm.stock.running_mean, norm.stock.running_var]
        for found, want in zip((norm.mean, norm.var), expected, strict=True):
            assert torch.equal(found.cpu().isfinite(), want.isfinite())


def check_versions(run: Run, device: str) -> None:
    """Autograd notices that what it saved was changed."""
    norm = Norm(device=device)
    update = norm.update(batch())
    leaf = torch.ones(5, device=device, requires_grad=True)
    stats_version = update.stats._version
    for buffer in (norm.mean, norm.var, norm.counter):
        version = buffer._version
        out = (leaf * buffer).sum()
        run([update])
        assert buffer._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
    assert update.stats._version == stats_version


def check_refusals(run: Run, device: str) -> None:
    """Wrong shapes are refused before anything is written."""
    norm = Norm(device=device)
    good = norm.update(batch())
    before = norm.mean.clone(), norm.counter.clone()
    zeros = torch.zeros(6, device=device)
    wrong = {
        r"running_mean must have shape \[5\], got \[6\]": good._replace(running_mean=zeros),
        r"running_var must have shape \[5\], got \[1, 6\]": good._replace(running_var=zeros[None]),
        r"running_var must not be expanded": good._replace(running_var=zeros[:1].expand(5)),
        r"counter must be a 0-d int64": good._replace(counter=torch.zeros(1, device=device).long()),
        r"stats must have shape \[5, C\]": good._replace(stats=good.stats[:2]),
    }
    for message, update in wrong.items():
        with pytest.raises(ValueError, match=message):
            run([good, update])
    assert torch.equal(norm.mean, before[0]) and norm.counter == before[1]


KERNEL_CHECKS = (check_steps, check_shared, check_layouts, check_special_values, check_versions,
                 check_refusals)  # fmt: skip
#: Formulas leave shapes to torch.
CHECKS = KERNEL_CHECKS[:-1]
