"""What every backend's own tests hold it to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastres
from fastres import tuning
from fastres.block import autotune
from fastres.kernels import (
    IN_PLACE,
    Branch,
    Gate,
    Implementation,
    RunningUpdate,
    implementations,
    tuned,
)
from fastres.testing import (
    CASES,
    BlockCase,
    Call,
    Case,
    FunctionalBlock,
    calls,
    check_block,
    check_implementation,
)


def check_cases(entry: Implementation, cases: Iterable[Case], device: str) -> int:
    """Hold an implementation to every case; the number of calls that it accepted."""
    failures, ran = [], 0
    for case in cases:
        try:
            ran += len(check_implementation(entry, case, device=device).ran)
        except Exception as error:  # One that crashes is a failure like the others.
            failures.append(f"{case}: {error!r}")
    assert not failures, f"{len(failures)} cases fail, the first five:\n" + "\n".join(failures[:5])
    return ran


def accepts(entry: Implementation, cases: Iterable[Case], device: str) -> bool:
    """Whether an implementation accepts any call of any case; nothing runs."""
    return any(
        entry.why_not(call.request) is None
        for case in cases
        for call in calls(entry.primitive, case, entry.backend, device)
    )


def check_repeats(entries: Iterable[Implementation], device: str, repeats: int) -> None:
    """So many runs on the same input give the same bits."""
    case = next(c for c in CASES if c.shape == (2, 16, 6, 5) and c.dtype == torch.bfloat16)
    for entry in entries:
        for call in calls(entry.primitive, case, entry.backend, device):
            if entry.why_not(call.request) is not None or call.in_place is not None:
                continue
            first = _run(entry, call)
            for _ in range(repeats - 1):
                for a, b in zip(first, _run(entry, call), strict=True):
                    assert torch.equal(a.nan_to_num(), b.nan_to_num())


def _run(entry: Implementation, call: Call) -> list[Tensor]:
    kwargs = dict(call.kwargs)
    if kwargs.get("overwrite"):
        kwargs["accumulate"] = kwargs["accumulate"].clone()
    if entry.primitive in IN_PLACE:
        updates = [
            RunningUpdate(*(t.clone() if isinstance(t, Tensor) else t for t in update))
            for update in call.args[0]
        ]
        entry.run(updates)
        return [t for u in updates for t in u[1:4] if t is not None]
    return _tensors(entry.run(*call.args, **kwargs))


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        # The third row of sums without a second branch is nobody's.
        return [result[:2] if result.dim() == 2 and len(result) == 3 else result]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in _tensors(part)]
    return []


def check_float64_is_refused(backend: str, device: str) -> None:
    """With its reason, where the backend was asked for by name."""
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, device=device)
    mean, var = torch.zeros(4, dtype=x.dtype, device=device), torch.ones_like(x[0, :, 0, 0])
    with (
        fastres.use_backend(backend),
        pytest.raises(NotImplementedError, match="dtype must be float32, bfloat16 or float16"),
    ):
        fastres.functional.bn_relu(x, mean, var, training=True)


def needs_gpu(device: str) -> None:
    """Skip where there is none."""
    if device != "cuda":
        pytest.skip("for a GPU")


def check_graph_capture(backend: str, level: str, device: str) -> None:
    """A block's step replayed from a CUDA graph gives what it gave."""
    needs_gpu(device)
    case = BlockCase("graph", dtype=torch.bfloat16, shape=(4, 64, 14, 14), width=16)
    block = FunctionalBlock.of(case.stock(device))
    x, grad = case.input(device=device).requires_grad_(), case.input("grad", device)

    def step() -> list[Tensor]:
        with fastres.use_backend(backend), fastres.use_level(level):
            out = block(x)
            return [out, *torch.autograd.grad(out, [x, *block.parameters()], grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def check_tuned_block(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """A block is right with whatever the autotuner finds fastest, and so is its CUDA graph.

    Without poison, under which nothing is measured: it makes torch deterministic.
    """
    needs_gpu(device)
    monkeypatch.delenv("FASTRES_AUTOTUNE", raising=False)
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(folder))
    monkeypatch.setattr(tuned, "_chosen", {})
    monkeypatch.setattr(autotune, "_tuned", {})
    tuning.forget()
    case = BlockCase("tuned", dtype=torch.bfloat16, shape=(32, 256, 28, 28), width=64)
    stock = case.stock(device)
    x = case.input(device=device).requires_grad_()
    try:
        with fastres.use_backend(backend):
            check_block(stock, FunctionalBlock.of(stock), x, what=f"tuned {case}")
        assert tuning.kept(torch.device(device)), "nothing was measured"
        check_graph_capture(backend, "auto", device)
    finally:
        tuning.forget()


#: Images of a stem's output that have more elements than 32 bits count.
FAR = 2700


def check_far_offsets(backend: str, device: str, images: int = FAR) -> None:
    """What lies beyond 2^31 elements is read and written: 13 GB of activations."""
    needs_gpu(device)
    shape = (images, 64, 112, 112)
    y = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)
    y.normal_()
    y[-1] += 50
    run = {entry.primitive: entry.run for entry in implementations(backend=backend)}
    count = y.numel() // 64
    stats = run["finalize_stats"](
        run["channel_stats"](y), count, None, None, None, 1e-5, acc=torch.float32
    )
    mean, var = _moments(y)
    torch.testing.assert_close(stats[0].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats[1].double(), var, rtol=1e-5, atol=0)
    out, _ = run["scale_shift_act"](y, stats, act="relu")
    last, _ = run["scale_shift_act"](y[-1:].clone(), stats, act="relu")
    assert torch.equal(out[-1:], last)
    gate, branch = Gate("none"), Branch(y, stats)
    sums = run["bn_act_backward_reduce"](y, gate, (branch,))
    normed = (var + 1e-5).rsqrt()
    torch.testing.assert_close(sums[0].double(), mean * count, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[1].double(), var * count * normed, rtol=1e-5, atol=0)
    apply = run["bn_act_backward_apply"]
    (grad,), _ = apply(y, gate, (branch,), sums, count, want_grads=(True,))
    tail = y[-1:].clone()
    (last,), _ = apply(tail, gate, (Branch(tail, stats),), sums, count, want_grads=(True,))
    assert torch.equal(grad[-1:], last)


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel in float64, a part of the images at a time."""
    count = y.numel() // y.shape[1]
    mean = sum(part.double().sum((0, 2, 3)) for part in y.split(100)) / count
    centred = (part.double() - mean.view(-1, 1, 1) for part in y.split(100))
    return mean, sum(part.square().sum((0, 2, 3)) for part in centred) / count
