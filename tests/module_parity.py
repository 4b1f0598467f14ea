"""One training or inference step of a module, and comparisons of two such steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Step = dict[str, Tensor]

#: Bound on the rounding errors of one step in units of eps times the largest value of a tensor.
#: Fused and stock path sum the same terms in another order. The longest sums of these tests have
#: a few thousand terms, whose order moves the result by about sqrt(4096) = 2^6 eps; batch norm
#: divides by standard deviations down to 2^-2, and there are up to about 2^4 layers in a row.
REORDERING = 2**12


class FusedCalls(TorchDispatchMode):
    """Counts the fused operators that are really called."""

    sees_fused_blocks = True

    def __init__(self) -> None:
        super().__init__()
        self.forward = 0
        self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forward += func is torch.ops.fastres.block_forward.default
        self.backward += func is torch.ops.fastres.block_backward.default
        return func(*args, **(kwargs or {}))


def first_tensor(out: Any) -> Tensor:
    """The main result of a model, whatever it wraps it in."""
    if isinstance(out, Tensor):
        return out
    found = out.logits if "logits" in out else out.last_hidden_state
    assert isinstance(found, Tensor)
    return found


def step(module: nn.Module, *inputs: Tensor, backward: bool = True) -> Step:
    """Run a module forward and backward: its output, every gradient, and its buffers."""
    given = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
    if not backward:
        with torch.no_grad():
            return {"out": first_tensor(module(*given)), **buffers(module)}
    module.zero_grad(set_to_none=True)
    given = [x.requires_grad_() for x in given]
    out = first_tensor(module(*given))
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out).view(out.shape)
    (out * torch.sin(37 * weights)).sum().backward()
    grads = {f"grad {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    grads |= {f"grad input {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    return {"out": out.detach(), **grads, **buffers(module)}


def buffers(module: nn.Module) -> Step:
    """Copies of all buffers."""
    return {f"buffer {name}": b.detach().clone() for name, b in module.named_buffers()}


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference; NaN and infinities must be in the same places."""
    a, b = found.detach().double(), expected.detach().double()
    assert torch.equal(a.isnan(), b.isnan()), "NaN in other places"
    odd = ~b.isfinite()
    assert torch.equal(a[odd & ~b.isnan()], b[odd & ~b.isnan()]), "infinities differ"
    left = (a - b)[~odd]
    return float(left.abs().max()) if left.numel() else 0.0


def scale(t: Tensor) -> float:
    """The largest finite magnitude."""
    finite = t.double()[t.isfinite()]
    return float(finite.detach().abs().max()) if finite.numel() else 0.0


def assert_same(found: Step, expected: Step, factor: float = REORDERING) -> None:
    """Equal up to the order of summation, in the dtype of `expected`; counters exactly.

    Gradients that cancel to rounding errors of their terms are measured against the largest
    gradient of the step.
    """
    assert found.keys() == expected.keys()
    largest = max([scale(t) for name, t in expected.items() if name.startswith("grad")] or [0.0])
    for name, want in expected.items():
        have = found[name]
        assert (have.shape, have.dtype) == (want.shape, want.dtype), name
        if not want.is_floating_point():
            assert torch.equal(have, want), name
            continue
        size = largest if name.startswith("grad") else max(scale(want), 1.0)
        bound = factor * torch.finfo(want.dtype).eps * size
        assert error(have, want) <= bound, f"{name}: {error(have, want)} > {bound}"


def assert_two_x(found: Step, stock: Step, truth: Step) -> None:
    """Error against float64 at most twice that of the stock path, plus one rounding."""
    assert found.keys() == stock.keys() == truth.keys()
    for name, want in truth.items():
        if not want.is_floating_point():
            assert torch.equal(found[name], want), name
            continue
        assert found[name].dtype == stock[name].dtype, name
        rounding = torch.finfo(found[name].dtype).eps * scale(want)
        bound = 2 * error(stock[name], want) + rounding
        assert error(found[name], want) <= bound, f"{name}: {error(found[name], want)} > {bound}"


def randomise(module: nn.Module) -> nn.Module:
    """Give batch norms weights, biases and running statistics that tell mistakes apart."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            with torch.no_grad():
                for t, low in ((m.weight, 0.5), (m.bias, -0.5), (m.running_mean, -0.5)):
                    if t is not None:
                        t.uniform_(low, low + 1)
                if m.running_var is not None:
                    m.running_var.uniform_(0.5, 2)
    return module


def raised(run: Callable[[], Any]) -> tuple[type[BaseException], str]:
    """Type and text of the exception that `run` raises."""
    try:
        run()
    except Exception as exception:
        return type(exception), str(exception)
    raise AssertionError("nothing was raised")
