"""torch.func, forward-mode differentiation and tensor subclasses, eager and compiled."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kinds import CLASSIC, Kind
from kinds import KINDS as BLOCKS
from module_parity import randomise
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import fastres
from fastres.nn import stock

Run = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _parameters(channels: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.rand(channels, generator=g, dtype=torch.float64) + 0.5 for _ in range(4))


def pair_of(kind: str) -> tuple[Run, Run]:
    """Something of fastres in eval mode and the same of torch, for [2, 4, 3, 3] in float64."""
    if kind == "block":
        fused = randomise(fastres.Bottleneck(4, 1)).double().eval()
        twin = stock.Bottleneck(4, 1).double().eval()
        twin.load_state_dict(fused.state_dict())
        return fused, twin
    mean, var, weight, bias = _parameters(4)
    if kind == "add_relu":
        return lambda x: fastres.functional.add_relu(x, 2 * x), lambda x: F.relu(x + 2 * x)
    return (
        lambda x: fastres.functional.bn_relu(x, mean, var, weight, bias),
        lambda x: F.relu(F.batch_norm(x, mean, var, weight, bias)),
    )


KINDS = ("block", "function", "add_relu")


def _dual(f: Run, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent
    return torch.zeros(()) if tangent is None else tangent


#: Each makes of a function and its argument what a transform of the function gives.
TRANSFORMS: dict[str, Callable[[Run, Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x.cos()])),
    "jacrev": lambda f, x: torch.func.jacrev(lambda x: f(x).mean((0, 2, 3)))(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(lambda x: f(x).mean((0, 2, 3)))(x),
    "vmap of grad": lambda f, x: torch.func.vmap(
        torch.func.grad(lambda x: f(x[None]).square().sum())
    )(x),
    "dual numbers": _dual,
}


#: What torch cannot compile of its own operators: forward mode through a batch norm.
IMPOSSIBLE = {
    *itertools.product(("block", "function"), ("jvp", "jacfwd", "dual numbers"), ["outside"]),
    ("block", "dual numbers", "inside"),
}
COMBINATIONS = [
    combination
    for combination in itertools.product(KINDS, TRANSFORMS, ("eagerly", "inside", "outside"))
    if combination not in IMPOSSIBLE
]


@pytest.mark.grid(4)
@pytest.mark.parametrize(("kind", "name", "compiled"), COMBINATIONS)
def test_a_transform_gives_what_it_gives_of_torchs_own(kind: str, name: str, compiled: str) -> None:
    """A compiled gradient was exactly zero: the guards were skipped as the compiler traced."""
    transform, x = TRANSFORMS[name], torch.randn(2, 4, 3, 3, dtype=torch.float64)
    fused, twin = pair_of(kind)
    expected = transform(twin, x)
    assert bool(expected.any())
    if compiled == "inside":  # the function is compiled, and then transformed
        fused = torch.compile(fused, backend="aot_eager")
        run = transform
    else:
        run = torch.compile(transform, backend="aot_eager") if compiled == "outside" else transform
    torch.testing.assert_close(run(fused, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_compiled_plainly_is_compiled_anew_for_a_transform(kind: str) -> None:
    fused, twin = pair_of(kind)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    compiled = torch.compile(fused, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), twin(x))
    # torch itself has no forward mode for a compiled function that saves something for backward.
    modes = ("dual numbers",) if kind != "block" else ()
    for name in ("grad", "vmap", "jvp", *modes):
        torch.testing.assert_close(TRANSFORMS[name](compiled, x), TRANSFORMS[name](twin, x))


@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_parameters_by_functional_call_in_a_compiled_step(train: bool) -> None:
    fused, twin = (m.train(train) for m in pair_of("block"))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    found = []
    for module in (fused, twin):
        assert isinstance(module, nn.Module)
        if train:  # torch.func asks for batch norms without buffers
            torch.func.replace_all_batch_norm_modules_(module)

        def loss(p: dict[str, Tensor], x: Tensor, module: nn.Module = module) -> Tensor:
            return torch.func.functional_call(module, p, (x,)).square().mean()

        parameters = {k: v.detach() for k, v in module.named_parameters()}
        step = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)
        found.append(step(parameters, x))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_of_a_subclass_keeps_it(kind: str, compiled: bool) -> None:
    fused, twin = pair_of(kind)
    if isinstance(fused, nn.Module):
        fused.requires_grad_(False)
    run = torch.compile(fused, backend="aot_eager") if compiled else fused
    x, y = (torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in range(2))
    out = run(TwoTensor(x, y))
    assert type(out) is TwoTensor
    torch.testing.assert_close((out.a, out.b), (twin(x), twin(y)))


def test_a_parameter_of_a_subclass_in_a_compiled_block() -> None:
    fused, twin = pair_of("block")
    assert isinstance(fused, nn.Module) and isinstance(twin, nn.Module)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = twin(x)
    weight = fused.conv1.weight.detach()
    fused.conv1.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    out = torch.compile(fused, backend="aot_eager")(x)
    assert type(out) is TwoTensor
    torch.testing.assert_close(out.a, expected)


# ---------------------------------------------------------------- every kind of block


def _grad(f: Run, x: Tensor) -> Tensor:
    found: Tensor = torch.func.grad(lambda x: f(x).square().sum())(x)
    return found


#: Eagerly; and compiled, where a guard that is skipped shows as a gradient of zero.
EAGER: dict[str, Callable[[Run, Tensor], Any]] = {
    "grad": _grad,
    "vmap": TRANSFORMS["vmap"],
    "jvp": TRANSFORMS["jvp"],
    "jacrev": TRANSFORMS["jacrev"],
}


@pytest.mark.parametrize("each", [*CLASSIC, *BLOCKS], ids=str)
def test_transforms_of_each_kind(each: Kind) -> None:
    stock_block, fused = each.pair(torch.float64, training=False)
    x = each.input(torch.float64, shape=(2, 3, 2)).detach()
    for transform in EAGER.values():
        torch.testing.assert_close(transform(fused, x), transform(stock_block, x))
    compiled = torch.compile(lambda x: _grad(fused, x), backend="aot_eager")
    expected = _grad(stock_block, x)
    assert bool(expected.any())
    torch.testing.assert_close(compiled(x), expected)


class _Doubled(nn.Module):
    """Traced rather than known: a chain in somebody's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) * 2 + x


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_what_is_traced(name: str) -> None:
    twin = randomise(_Doubled()).double().eval()
    fused = copy.deepcopy(twin)
    assert fastres.convert(fused).changed == 1
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    transform = TRANSFORMS[name]
    if name == "vmap of grad":
        x = x[:1]
    torch.testing.assert_close(transform(fused, x), transform(twin, x))
    if name in ("grad", "vjp", "jacrev"):
        run = torch.compile(transform, backend="aot_eager")
        torch.testing.assert_close(run(fused, x), transform(twin, x))
