"""Max pooling at the end of a chain: its kernels, blocks that end with it, and who finds them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from module_parity import FusedCalls, assert_same, randomise, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastres
from fastres.block import Block, Layer, Norm, Unit, call, decode, try_layers
from fastres.block.backward import _Backward
from fastres.block.plan import make_plan
from fastres.kernels import (
    BACKENDS,
    Conv,
    Gate,
    Implementation,
    MaxPool,
    implementations,
    reference,
    registry,
)
from fastres.nn import Parts, Steps, bound
from fastres.nn.blocks import FusedModule
from fastres.testing import CASES, check_block, check_implementation, saved_bytes

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LAST = torch.channels_last

#: Windows that overlap or do not, reach beyond an edge, leave pixels out, or see all of an axis.
POOLS = {
    "stem": MaxPool((3, 3), (2, 2), (1, 1)),
    "2x2": MaxPool((2, 2), (2, 2)),
    "ceil": MaxPool((3, 2), (2, 3), (0, 1), ceil_mode=True),
    "dilated": MaxPool((2, 3), (1, 2), (1, 1), (2, 1)),
    "apart": MaxPool((1, 2), (3, 4)),
    "wide": MaxPool((5, 5), (1, 1), (2, 2)),
    "most taps": MaxPool((15, 17), (1, 2), (7, 8)),
}
SIZES = ((7, 6), (1, 1), (4, 9), (15, 17))


def shapes_of(pool: MaxPool) -> list[tuple[int, int]]:
    return [size for size in SIZES if pool.why_not(size) is None]


# ---------------------------------------------------------------- geometry


GEOMETRIES = [
    MaxPool((k, 2), (s, 1), (p, 0), (d, 1), ceil)
    for k, s, p, d, ceil in itertools.product((1, 2, 3), (1, 2, 3), (0, 1), (1, 2), (False, True))
]


def _torchs(pool: MaxPool, size: tuple[int, int]) -> Tensor | None:
    try:
        return pool.apply(torch.zeros(1, 1, *size))
    except RuntimeError:
        return None


@pytest.mark.parametrize("height", range(1, 8))
def test_sizes_are_torchs(height: int) -> None:
    for pool in GEOMETRIES:
        out, size = _torchs(pool, (height, 5)), (height, 5)
        if pool.why_not(size) is None:
            assert out is not None and out.shape[2:] == pool.output_size(size)
        elif out is not None:
            # torch pools padding alone to -inf, as a gradient shows that goes nowhere.
            assert pool.dilation[0] > 1 and out.isneginf().any()


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (MaxPool((16, 16), (1, 1)), "at most 255 taps"),
        (MaxPool((3, 3), (1, 1), (2, 2)), "half of the window"),
        (MaxPool((3, 3), (0, 1)), "must be positive"),
        (MaxPool((9, 1), (1, 1)), "no window"),
        (MaxPool((2, 1), (1, 1), (2, 0), (4, 1)), "nothing but padding"),
    ],
)
def test_what_kernels_do_not_pool(pool: MaxPool, reason: str) -> None:
    assert reason in str(pool.why_not((3, 3) if pool.kernel[0] < 9 else (5, 5)))


def test_taps_and_indices_are_inverse() -> None:
    for pool in POOLS.values():
        for size in shapes_of(pool):
            _, indices = F.max_pool2d(torch.randn(2, 3, *size), *pool, return_indices=True)
            taps = reference.taps_of(indices, pool, size[1])
            assert torch.equal(reference.indices_of(taps, pool, size[1]), indices)


# ---------------------------------------------------------------- kernels, against torch's own


def _special(shape: tuple[int, ...], kind: str) -> Tensor:
    """float32 values: small integers are full of ties."""
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=g)
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=g).float()
    where = torch.rand(shape, generator=g) < 0.4
    if kind == "nan":
        return x.masked_fill(where, torch.nan)
    if kind == "low":
        return x.masked_fill(torch.rand(shape, generator=g) < 0.9, -torch.inf)
    return x.masked_fill(where, torch.inf) if kind == "inf" else x


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


_cpu = pytest.importorskip("fastres._cpu")

from fastres.kernels.cpu import pooling  # noqa: E402
from fastres.kernels.cpu.pointwise import scale_shift_act  # noqa: E402


@pytest.fixture(params=_cpu.isas())
def isa(request: pytest.FixtureRequest) -> Any:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


#: Less than a vector, one, and more; nothing but the rest of one.
CHANNELS = (1, 16, 19, 64)


@pytest.mark.parametrize("act", ["none", "relu", "hardswish"])
@pytest.mark.parametrize("kind", ["normal", "ties", "nan", "inf", "low"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.usefixtures("isa")
def test_forward_has_torchs_bits_and_taps(dtype: torch.dtype, kind: str, act: str) -> None:
    for pool, c in itertools.product(POOLS.values(), CHANNELS):
        for size in shapes_of(pool):
            y = _special((2, c, *size), kind).to(dtype).contiguous(memory_format=LAST)
            stats = torch.randn(5, c, dtype=F64 if dtype == F64 else F32)
            z, _ = scale_shift_act(y, stats, act=act)
            for given in (z, z.contiguous()):
                expected, indices = F.max_pool2d(given, *pool, return_indices=True)
                out, taps = pooling.scale_shift_act_pool(
                    y, stats, pool=pool, act=act, want_argmax=True
                )
                assert taps is not None and _same(out, expected)
                assert torch.equal(reference.indices_of(taps, pool, size[1]), indices)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.usefixtures("isa")
def test_backward_has_torchs_bits(dtype: torch.dtype) -> None:
    """In 16 bits torch rounds after each addition: there the sum is rounded once."""
    for pool, c in itertools.product(POOLS.values(), CHANNELS):
        for size in shapes_of(pool):
            z = _special((2, c, *size), "ties").to(dtype).contiguous(memory_format=LAST)
            out, indices = F.max_pool2d(z, *pool, return_indices=True)
            taps = reference.taps_of(indices, pool, size[1])
            grad_out = torch.randn_like(out)
            grad_out[0, 0, 0, 0] = torch.inf
            wide = F32 if dtype.itemsize < 4 else dtype
            leaf = z.to(wide).requires_grad_()
            F.max_pool2d(leaf, *pool).backward(grad_out.to(wide))
            assert leaf.grad is not None
            grad = pooling.max_pool_backward(grad_out, taps, pool, size)
            assert _same(grad, leaf.grad.to(dtype))


@pytest.mark.usefixtures("isa")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    pool, before = POOLS["stem"], torch.get_num_threads()
    y = torch.randn(3, 64, 41, 30).contiguous(memory_format=LAST)
    stats = torch.randn(5, 64)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, taps = pooling.scale_shift_act_pool(
                y, stats, pool=pool, act="relu", want_argmax=True
            )
            assert taps is not None
            found.append((out, taps, pooling.max_pool_backward(out, taps, pool, (41, 30))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [((6, 0), "must be positive"), ((6, 256), "at most 255 taps"), ((0, -1), "non-negative"),
     ((14, 4), "dtype")],
)  # fmt: skip
def test_bad_shapes_raise(change: tuple[int, int], message: str) -> None:
    shape = [1, 1, 3, 3, 2, 2, 2, 2, 1, 1, 0, 0, 1, 1, 0]
    shape[change[0]] = change[1]
    with pytest.raises(ValueError, match=message):
        _cpu.max_pool_backward(1, 1, 1, shape, 1)


# ---------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Chain:
    """Convolutions with norms and activations, and max pooling behind the last."""

    name: str
    convs: int = 1
    pool: MaxPool = POOLS["stem"]
    act: Callable[[], nn.Module] = nn.ReLU
    norm: bool = True

    def __str__(self) -> str:
        return self.name

    def pair(
        self, dtype: torch.dtype = F32, last: bool = True, training: bool = True
    ) -> tuple[nn.Module, nn.Module]:
        """(stock, fused) with the same values."""
        torch.manual_seed(1)
        stock = randomise(StockChain(self)).to(dtype)
        stock = stock.to(memory_format=LAST) if last else stock
        for m in stock.modules():
            if isinstance(m, nn.BatchNorm2d) and dtype.itemsize < 4:
                m.float()
        fused = copy.deepcopy(stock.train(training))
        fused.__class__ = FusedChain
        return stock, fused

    def input(
        self, dtype: torch.dtype = F32, last: bool = True, shape: tuple[int, ...] = (6, 3, 23, 18)
    ) -> Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=F64).to(dtype)
        return (x.contiguous(memory_format=LAST) if last else x).requires_grad_()


class StockChain(nn.Module):
    def __init__(self, chain: Chain) -> None:
        super().__init__()
        sizes = [(3, 8 if chain.convs > 1 else 24, 2), *[(8, 8, 1)] * chain.convs]
        sizes = sizes[: chain.convs]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, s, 1, bias=not chain.norm) for i, o, s in sizes
        )
        norms = [nn.BatchNorm2d(o) for _, o, _ in sizes]
        self.norms = nn.ModuleList([*norms[:-1], norms[-1] if chain.norm else nn.Identity()])
        self.act = chain.act()
        self.pool = nn.MaxPool2d(
            chain.pool.kernel, chain.pool.stride, chain.pool.padding, chain.pool.dilation,
            ceil_mode=chain.pool.ceil_mode,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.act(norm(conv(x)))
        out: Tensor = self.pool(x)
        return out


class FusedChain(FusedModule, StockChain):
    def _parts(self) -> Parts:
        units = [Steps(c, n, self.act) for c, n in zip(self.convs, self.norms, strict=True)]
        units[-1] = units[-1]._replace(act=None)
        return Parts(tuple(units), self.act, "none", max_pool=self.pool)


STEM, DEEP = Chain("stem"), Chain("deep", 3)
CHAINS = (
    STEM, DEEP, Chain("ceil", 1, POOLS["ceil"]), Chain("silu", 2, POOLS["2x2"], nn.SiLU),
    Chain("linear", 1, POOLS["wide"], nn.Identity), Chain("bare", 2, norm=False),
)  # fmt: skip

MODES = {
    "speed": {"memory": "speed"},
    "balanced": {"memory": "balanced"},
    "lean": {"memory": "lean"},
    "nchw": {"last": False},
    "float64": {"dtype": F64},
    "bfloat16": {"dtype": BF16},
    "float16": {"dtype": F16},
    "eval": {"training": False},
    "inference": {"training": False, "grad": False},
    "no grad": {"grad": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_parity(chain: Chain, mode: str) -> None:
    options: dict[str, Any] = {"dtype": F32, "last": True, "training": True, **MODES[mode]}
    memory, grad = options.pop("memory", "auto"), options.pop("grad", True)
    stock, fused = chain.pair(**options)
    x = chain.input(options["dtype"], options["last"])
    assert fused.why_not(x) is None
    with fastres.use_memory(memory), torch.set_grad_enabled(grad):
        check_block(stock, fused, x if grad else x.detach(), what=str(chain), steps=2)


@pytest.mark.parametrize("backend", [n for n, b in BACKENDS.items() if b.why_not() is None])
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_backends(backend: str, last: bool) -> None:
    if "cpu" not in BACKENDS[backend].devices:
        pytest.skip(f"{backend} does not run on a CPU")
    stock, fused = DEEP.pair(last=last)
    with fastres.use_backend(backend):
        check_block(stock, fused, DEEP.input(last=last))


#: Which parameters want a gradient, by a part of their name; x does where it is among them.
SUBSETS = (("x",), ("norms.2",), ("norms.2.bias",), ("convs.2",), ("convs.0",), ("norms.0", "x"))


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_frozen_parameters(training: bool, subset: tuple[str, ...]) -> None:
    stock, fused = DEEP.pair(F64, training=training)
    for m in (stock, fused):
        for name, p in m.named_parameters():
            p.requires_grad_(any(part in name for part in subset))
    check_block(stock, fused, DEEP.input(F64).detach().requires_grad_("x" in subset))


def _results(module: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = module(leaf)
    out.backward(torch.ones_like(out).cumsum(1))
    assert leaf.grad is not None
    return [out.detach(), leaf.grad, *[p.grad for p in module.parameters()], *module.buffers()]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_values(value: float) -> None:
    """With running statistics, so that they reach single pixels only."""
    for chain in (STEM, DEEP):
        stock, fused = chain.pair(training=False)
        x = chain.input().detach()
        x[1, 1, 7, 8], x[2, 0, 0, 0] = value, value
        for a, b in zip(_results(stock, x), _results(fused, x), strict=True):
            torch.testing.assert_close(b, a, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("chain", [STEM, DEEP, CHAINS[3]], ids=str)
def test_gradcheck(chain: Chain, training: bool) -> None:
    _, fused = chain.pair(F64, training=training)
    names = [n for n, _ in fused.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        out: Tensor = torch.func.functional_call(fused, given, (x,))
        return out.square()

    inputs = (
        chain.input(F64, shape=(2, 3, 9, 8)),
        *(p.detach().clone().requires_grad_() for p in fused.parameters()),
    )
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True, atol=1e-4)


def test_gradients_by_the_batch() -> None:
    results = []
    for module in STEM.pair(F64):
        x = STEM.input(F64, shape=(2, 3, 7, 8))
        y = module(x).mean((2, 3))[:, :2]
        basis = torch.eye(y.numel(), dtype=x.dtype).view(-1, *y.shape)
        results.append(torch.autograd.grad(y, x, basis, is_grads_batched=True)[0])
    torch.testing.assert_close(results[1], results[0])


def test_nothing_but_raw_outputs_statistics_and_taps_is_saved() -> None:
    """What is pooled would be as large as the raw output, torch's indices twice its half."""
    _, fused = STEM.pair()
    x = STEM.input().detach()
    n, _, h, w = x.shape
    raw, pooled = (n, 24, (h + 1) // 2, (w + 1) // 2), (n, 24, (h + 3) // 4, (w + 3) // 4)
    elements = [torch.Size(shape).numel() for shape in (raw, pooled)]
    kept = 4 * elements[0] + elements[1] + 4 * 5 * 24
    output = 4 * elements[1]
    found = saved_bytes(fused, lambda: fused(x)) - 4 * x.numel()
    # A piece of what is kept begins at a multiple of 64 bytes.
    assert kept <= found <= kept + 3 * 64 < kept + output


def test_the_same_kernels_as_a_program() -> None:
    for chain, training in itertools.product((STEM, DEEP), (True, False)):
        _, fused = chain.pair(training=training)
        x = chain.input()
        fused(x).sum().backward()
        (prepared,) = [c for c in bound._bound[fused].calls if c is not None]
        assert prepared.pool is None and prepared.run.programs is not None
        assert min(prepared.run.programs.steps) > 1 and len(prepared.run.programs.steps) == 2


def test_programs_have_the_bits_of_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    for chain, dtype in itertools.product((STEM, DEEP), (F32, BF16)):
        _, fused = chain.pair(dtype)
        walked = copy.deepcopy(fused)
        x = chain.input(dtype).detach()
        written = _results(fused, x)
        with monkeypatch.context() as patched:
            patched.setattr("fastres.block.op.recorder", lambda *_: None)
            expected = _results(walked, x)
        assert all(torch.equal(a, b) for a, b in zip(written, expected, strict=True))


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_torch_pools_where_no_kernel_does(last: bool) -> None:
    """Its indices would only be turned into taps."""
    _, fused = STEM.pair(last=last)
    with fastres.use_backend("aten" if last else "auto"), FusedCalls() as calls:
        fused(STEM.input(last=last)).sum().backward()
    assert calls.forward == calls.backward == 1
    with fastres.use_backend("aten" if last else "auto"):
        prepared = bound.bound_of(fused, fused._parts()).call(STEM.input(last=last))
    assert prepared.pool == POOLS["stem"] and prepared.run.block.max_pool is None


def test_operators_run_with_torchs_pooling_too() -> None:
    """A compiler decides before anybody knows which kernels there will be."""
    stock, fused = STEM.pair()
    x = STEM.input().detach()
    with fastres.use_backend("aten"), pytest.MonkeyPatch.context() as patched:
        patched.setattr(call, "_pools_within", lambda *_: True)
        found = step(fused, x)
    assert_same(found, step(stock, x))


def test_a_block_as_text() -> None:
    block = Block((Unit(Conv(), Norm(1e-5)),), act="relu", max_pool=CHAINS[2].pool)
    assert decode(block.encode()) == block


@pytest.mark.parametrize("shortcut", ["input", "tensor"])
def test_no_pooling_behind_a_shortcut(shortcut: str) -> None:
    unit = Unit(None, Norm(1e-5))
    block = Block((unit,), shortcut, act="relu", max_pool=POOLS["2x2"])
    x = torch.randn(2, 4, 6, 6)
    assert try_layers(x, block, [Layer(unit)], x if shortcut == "tensor" else None) is None


class _Recorded(TorchDispatchMode):
    """The calls of the block operators."""

    sees_fused_blocks = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastres" and "block" in func.name():
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["speed", "lean"])
@pytest.mark.parametrize("chain", [STEM, DEEP], ids=str)
def test_opcheck(chain: Chain, memory: str) -> None:
    _, fused = chain.pair()
    with fastres.use_memory(memory), _Recorded() as recorded:
        fused(chain.input(shape=(2, 3, 9, 8))).square().sum().backward()
    assert len(recorded.calls) == 2
    for func, args in recorded.calls:
        assert decode(next(a for a in args if isinstance(a, str))).max_pool is not None
        torch.library.opcheck(func, tree_map_only(Tensor, Tensor.detach, args))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_compiles_without_a_graph_break(compiler: str, last: bool) -> None:
    torch._dynamo.reset()
    _, fused = DEEP.pair(last=last)
    run = torch.compile(copy.deepcopy(fused), backend=compiler, fullgraph=True)
    x = DEEP.input(last=last).detach()
    for a, b in zip(_results(fused, x), _results(run, x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- planted faults


def _first_tap(run: Any) -> Any:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, argmax = run(*args, **kwargs)
        return out, None if argmax is None else torch.zeros_like(argmax)

    return wrong


def _later_of_equals(run: Any) -> Any:
    """The last of equal values, as `>=` would have it."""

    def wrong(y: Tensor, stats: Tensor, *, pool: MaxPool, **more: Any) -> Any:
        out, argmax = run(y, stats, pool=pool, **more)
        flipped, behind = run(y.flip(2, 3), stats, pool=pool, **more)
        if argmax is None or flipped.shape != out.shape:
            return out, argmax
        last = pool.kernel[0] * pool.kernel[1] - 1 - behind.flip(2, 3)
        return out, torch.where(flipped.flip(2, 3) == out, last, argmax).to(torch.uint8)

    return wrong


def _zeros_as_padding(run: Any) -> Any:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, argmax = run(*args, **kwargs)
        return out.clamp(min=0), argmax

    return wrong


def _activation_forgotten(run: Any) -> Any:
    return lambda *a, **k: run(*a, **{**k, "act": "none"})


def _one_window_each(run: Any) -> Any:
    """A pixel takes the gradient of the last window that it won, as a store would."""

    def wrong(grad_out: Tensor, argmax: Tensor, pool: MaxPool, size: Any) -> Tensor:
        places = reference.indices_of(argmax, pool, size[1]).flatten(2)
        grad = torch.zeros(*grad_out.shape[:2], size[0] * size[1], dtype=grad_out.dtype)
        grad = grad.scatter(2, places, grad_out.flatten(2)).view(*grad_out.shape[:2], *size)
        return grad.to(memory_format=LAST)

    return wrong


def _tap_off_by_one(run: Any) -> Any:
    return lambda g, argmax, *a: run(g, (argmax.int() - 1).clamp(min=0).to(torch.uint8), *a)


PRIMITIVE_FAULTS = [
    ("scale_shift_act_pool", _first_tap),
    ("scale_shift_act_pool", _later_of_equals),
    ("scale_shift_act_pool", _zeros_as_padding),
    ("scale_shift_act_pool", _activation_forgotten),
    ("max_pool_backward", _one_window_each),
    ("max_pool_backward", _tap_off_by_one),
]


@pytest.mark.parametrize(
    ("primitive", "fault"), PRIMITIVE_FAULTS, ids=[f.__name__ for _, f in PRIMITIVE_FAULTS]
)
def test_fault_in_a_primitive_is_found(primitive: str, fault: Callable[[Any], Any]) -> None:
    (entry,) = implementations(primitive, "reference")
    broken: Implementation = replace(entry, run=fault(entry.run))
    caught = 0
    for case in CASES:
        try:
            check_implementation(broken, case)
        except (AssertionError, RuntimeError):
            caught += 1
    assert caught, f"{fault.__name__} passes every case"


ENGINE_FAULTS = {
    "pooling's gradient forgotten": (
        "_behind_pooling",
        lambda real: lambda self, g: torch.zeros_like(real(self, g)),
    ),
    "end gate left open": ("_end_gate", lambda real: lambda self: Gate("none")),
    "pooling's gradient doubled": (
        "_behind_pooling",
        lambda real: lambda self, g: 2 * real(self, g),
    ),
}


@pytest.mark.parametrize("name", ENGINE_FAULTS)
def test_fault_in_the_engine_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attribute, make = ENGINE_FAULTS[name]
    # Where windows see nothing positive the gate decides.
    shift = Chain("shifted", 1, POOLS["2x2"])

    def check() -> None:
        stock, fused = shift.pair(F64)
        for m in (stock, fused):
            nn.init.constant_(m.norms[0].bias, -1)
        with fastres.use_backend("reference"):
            check_block(stock, fused, shift.input(F64))

    check()
    monkeypatch.setattr(_Backward, attribute, make(getattr(_Backward, attribute)))
    with pytest.raises(AssertionError):
        check()


#: Ties are among zeros, whose gradient ends at ReLU, and none of its values is below zero.
SHOWN = [one for one in PRIMITIVE_FAULTS if one[1] not in (_later_of_equals, _zeros_as_padding)]


@pytest.mark.parametrize(("primitive", "fault"), SHOWN, ids=[f.__name__ for _, f in SHOWN])
def test_fault_in_a_primitive_shows_in_the_block(
    primitive: str, fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        stock, fused = STEM.pair(F64)
        with fastres.use_backend("reference"):
            check_block(stock, fused, STEM.input(F64))

    table = {key: list(entries) for key, entries in registry._TABLE.items()}
    table[primitive, "reference"] = [
        replace(e, run=fault(e.run)) for e in table[primitive, "reference"]
    ]
    make_plan.cache_clear()
    check()
    monkeypatch.setattr(registry, "_TABLE", table)
    make_plan.cache_clear()
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            check()
    finally:
        make_plan.cache_clear()
