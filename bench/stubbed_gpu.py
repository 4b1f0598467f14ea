"""Host time of a block on the path that GPUs take, with every launch an empty function.

`fastres bench host` runs this file in a process of its own. Something stands in for the compiled
CUDA module before fastres looks for it, and torch's convolutions and products only make memory. So
what is timed is fastres' Python, autograd and the allocations, on small tensors on the CPU. What a
launch costs itself, and a GPU's allocator beyond the CPU's, are not in it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import ModuleType
from typing import Any


def _nothing(*args: Any, **kwargs: Any) -> int:
    """A launch; or how many blocks of such a one are resident, one."""
    return 1


class _Stub(ModuleType):
    """A module all of whose functions do nothing."""

    emulated = True
    __file__ = __file__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _nothing)
        return _nothing


class _Beside:
    """A module some of whose functions are others."""

    def __init__(self, module: Any, **own: Any) -> None:
        self._module = module
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _stand_in() -> None:
    """Put empty functions where launches are; fastres must not have been imported."""
    os.environ["FASTRES_AUTOTUNE"] = "0"
    sys.modules["fastres._cuda"] = _Stub("fastres._cuda")
    import torch

    from fastres.kernels import aten
    from fastres.kernels.cuda import convolution as products

    # Programs take it for an operator that computes; what only makes memory they make themselves.
    def memory(shape: Any, like: Any) -> Any:
        n, c, h, w = shape
        return like.new_zeros((n, h, w, c)).permute(0, 3, 1, 2)

    def convolution(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, *rest: Any) -> Any:
        sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
        h, w = [(n + 2 * p - k) // s + 1 for n, k, s, p in sizes]
        return memory((x.shape[0], weight.shape[0], h, w), x)

    def backward(grad: Any, x: Any, weight: Any, *rest: Any) -> Any:
        pairs = zip((x, weight), rest[-1], strict=False)
        return [memory(t.shape, grad) if want else None for t, want in pairs]

    def product(a: Any, b: Any, *more: Any, out: Any) -> Any:
        return out.zero_()

    aten.aten = _Beside(aten.aten, convolution=convolution, convolution_backward=backward)
    products.torch = _Beside(torch, mm=product, addmm=product)


def main(rounds: int, calls: int) -> None:
    """Print, as JSON, by what is measured: microseconds of each round, and Python calls.

    Args:
        rounds: how often each is timed.
        calls: how many calls make up a round.
    """
    _stand_in()
    import torch
    from fastres.bench.host import blocks, python_calls, thunks

    import fastres

    torch.set_num_threads(1)
    found = {}
    with fastres.use_backend("cuda"):
        for what, run in thunks(blocks()["fastres"]).items():
            entered, samples = python_calls(run), []
            for _ in range(rounds):
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                samples.append((time.perf_counter() - start) / calls * 1e6)
            found[what] = {"calls": entered, "us": samples}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[-2:]))
