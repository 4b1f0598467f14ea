"""What every backend's own tests hold it to."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import fastres
from fastres.primitives import Implementation
from fastres.testing import (
    CASES,
    BlockCase,
    Call,
    Case,
    FunctionalBlock,
    calls,
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


def check_far_offsets(backend: str, device: str) -> None:
    """A stem's output at batch 4096 has more elements than 32 bits count."""
    needs_gpu(device)  # 8 GB of activations
    shape = (2700, 64, 112, 112)
    y = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)
    y.normal_()
    mean, var = torch.zeros(64, device=device), torch.ones(64, device=device)
    with fastres.use_backend(backend), torch.no_grad():
        out = fastres.functional.bn_relu(y, mean, var)
    assert torch.equal(out[-1], (y[-1].float() / (1 + 1e-5) ** 0.5).relu().bfloat16())
