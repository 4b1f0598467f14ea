"""Pre-activation, wide and squeeze-excite blocks, dropout and stochastic depth, against torch's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kinds import KINDS, RANDOM, SPARSE, Kind, kind, squeeze, twin
from module_parity import FusedCalls, assert_same, assert_two_x, raised, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastres
from fastres.block import backward, compose, op
from fastres.block.backward import _Backward
from fastres.block.forward import _Forward
from fastres.kernels import BACKENDS, Gated
from fastres.nn import (
    DropPath,
    EfficientChannelAttention,
    PreActBasicBlock,
    PreActBottleneck,
    SEBasicBlock,
    SqueezeExcitation,
    WideBasicBlock,
    factors,
    fused,
    register_gate,
)
from fastres.testing import check_block

BACKENDS_HERE = [n for n, b in BACKENDS.items() if "cpu" in b.devices and b.why_not() is None]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
#: Large enough for several ReLUs to open in one run and not in another.
LARGE = (8, 20, 20)

#: Over 60 draws of the smallest block's weights and input the largest error of a gradient was, in
#: the median, 0.9 times torch's; of single draws some exceed twice torch's by luck.
SMALL = (8, 9, 8)


def check(
    kind: Kind, dtype: torch.dtype = F32, last: bool = True, memory: str = "auto",
    training: bool = True, grad: bool = True,
) -> None:  # fmt: skip
    stock, block = kind.pair(dtype, last, training)
    x = kind.input(dtype, last, shape=LARGE if dtype.itemsize < 4 else SMALL)
    assert block.why_not(x) is None
    with fastres.use_memory(memory), torch.set_grad_enabled(grad):
        check_block(stock, block, x if grad else x.detach(), what=str(kind))


MODES = [
    pytest.param({"memory": "speed"}, id="speed"),
    pytest.param({"memory": "balanced", "last": False}, id="balanced-nchw"),
    pytest.param({"memory": "lean"}, id="lean"),
    pytest.param({"dtype": F64, "last": False}, id="float64-nchw"),
    pytest.param({"dtype": BF16}, id="bfloat16"),
    pytest.param({"training": False, "last": False}, id="eval-nchw"),
    pytest.param({"training": False, "grad": False}, id="inference"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parity(kind: Kind, mode: dict[str, Any]) -> None:
    check(kind, **mode)


@pytest.mark.parametrize("mode", [MODES[1], MODES[2], MODES[5], MODES[6]])
@pytest.mark.parametrize("kind", SPARSE, ids=str)
def test_parity_where_steps_are_missing(kind: Kind, mode: dict[str, Any]) -> None:
    check(kind, **mode)


@pytest.mark.exhaustive
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", [*KINDS, *SPARSE], ids=str)
def test_parity_of_all(
    kind: Kind, dtype: torch.dtype, last: bool, memory: str, training: bool
) -> None:
    check(kind, dtype, last, memory, training)
    if not training:
        check(kind, dtype, last, memory, training, grad=False)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_backends(kind: Kind, backend: str) -> None:
    with fastres.use_backend(backend):
        check(kind)


def test_running_statistics_of_several_steps() -> None:
    for each in (kind("preact-basic"), kind("se-bottleneck-projection")):
        stock, block = each.pair(F64)
        check_block(stock, block, each.input(F64), steps=3)


#: Which parameters want a gradient, by a part of their name; x does where it is among them.
SUBSETS = (("x",), ("bn1",), ("bn2.bias",), ("conv1",), ("conv2",), ("attention",), ("downsample",),
           ("conv", "x"), ())  # fmt: skip


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(s) or "none")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_frozen_parameters(training: bool, subset: tuple[str, ...]) -> None:
    for each in (*KINDS[1:5:2], *KINDS[6:9]):
        stock, block = each.pair(F64, training=training)
        for m in (stock, block):
            for name, p in m.named_parameters():
                p.requires_grad_(any(part in name for part in subset))
        x = each.input(F64).detach().requires_grad_("x" in subset)
        check_block(stock, block, x, what=str(each))


@pytest.mark.parametrize("name", [k.name for k in KINDS])
def test_autocast(name: str) -> None:
    """A pre-activation block reads its input at the precision in which it comes."""
    stock, block = kind(name).pair()
    truth = copy.deepcopy(stock).double()
    x = kind(name).input(shape=LARGE).detach()
    after = isinstance(block, (PreActBasicBlock, PreActBottleneck, WideBasicBlock))
    given = x.to(BF16) if after else x
    with torch.autocast("cpu", BF16), FusedCalls() as calls:
        found = step(block, given)
    assert calls.forward >= 1 and found["out"].dtype == BF16
    with torch.autocast("cpu", BF16):
        expected = step(stock, given)
    assert_two_x(found, expected, step(truth, given.double()))
    if after:  # With a float32 input torch's sum is float32: that is left to torch.
        with torch.autocast("cpu", BF16):
            assert_same(step(block, x), step(stock, x))


# ---------------------------------------------------------------- random numbers


def seeded(module: nn.Module, x: Tensor, steps: int = 2) -> dict[str, Tensor]:
    """The last of several steps in a row."""
    torch.manual_seed(11)
    for _ in range(steps):
        found = step(module, x)
    return found | {"next": torch.rand(3)}


@pytest.mark.parametrize("memory", ["speed", "balanced", "lean"])
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("kind", RANDOM, ids=str)
def test_random_numbers_are_torchs(kind: Kind, last: bool, memory: str) -> None:
    stock, block = kind.pair(F64, last)
    with fastres.use_memory(memory), FusedCalls() as calls:
        found = seeded(block, kind.input(F64, last))
    assert calls.forward >= 2
    assert_same(found, seeded(stock, kind.input(F64, last)))


@pytest.mark.parametrize("kind", RANDOM, ids=str)
def test_random_numbers_in_float32_and_in_evaluation(kind: Kind) -> None:
    stock, block = kind.pair()
    assert_same(seeded(block, kind.input()), seeded(stock, kind.input()))
    stock, block = kind.pair(training=False)
    assert_same(seeded(block, kind.input()), seeded(stock, kind.input()))
    with torch.no_grad():
        torch.testing.assert_close(block(kind.input()), stock(kind.input()))


@pytest.mark.parametrize("kind", RANDOM[::2], ids=str)
def test_random_numbers_under_checkpointing(kind: Kind) -> None:
    """Recomputed with the generator's state of the forward."""
    from torch.utils.checkpoint import checkpoint

    results = []
    for module in kind.pair(F64):
        torch.manual_seed(4)
        x = kind.input(F64)
        checkpoint(module, x, use_reentrant=False).square().sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_nothing_is_drawn_where_the_stock_path_runs() -> None:
    stock, block = kind("both").pair(F64)
    for m in (stock, block):
        m.downsample = nn.MaxPool2d(1)
    assert block.why_not() is not None
    assert_same(seeded(block, kind("both").input(F64)), seeded(stock, kind("both").input(F64)))


# ---------------------------------------------------------------- operators and compilers


class _Recorded(TorchDispatchMode):
    """The calls of the block operators."""

    sees_fused_blocks = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastres":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["speed", "lean"])
@pytest.mark.parametrize("name", ["preact-bottleneck-projection", "wide-dropout", "se-drop-path"])
def test_opcheck(name: str, memory: str) -> None:
    """Pre-activation, dropout, an open end, and statistics that are given."""
    _, block = kind(name).pair()
    with fastres.use_memory(memory), _Recorded() as recorded:
        block(kind(name).input(shape=(2, 4, 3))).square().sum().backward()
    forwards, backwards = [
        sum(name in func.name() for func, _ in recorded.calls) for name in ("forward", "backward")
    ]
    assert forwards == (2 if "se" in name else 1) == backwards
    for func, args in recorded.calls:
        torch.library.opcheck(func, tree_map_only(Tensor, Tensor.detach, args))


#: One of each kind.
COMPILED = ("preact-basic-activated", "wide-dropout-projection", "se-bottleneck-projection",
            "eca-drop-path-projection", "no-norms-se")  # fmt: skip


@pytest.mark.parametrize(
    ("compiler", "name"),
    [
        pytest.param(c, n, marks=[pytest.mark.exhaustive] if c == "inductor" and i > 2 else [])
        for c in ("aot_eager", "inductor")
        for i, n in enumerate(COMPILED)
    ],
)
def test_compiles_without_a_graph_break(compiler: str, name: str) -> None:
    import torch._inductor.config

    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        _, block = kind(name).pair()
        run = torch.compile(block, backend=compiler, fullgraph=True) if compiled else block
        x = kind(name).input()
        torch.manual_seed(3)
        with torch._inductor.config.patch(fallback_random=True):
            out = run(x)
            out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in block.parameters()),
                        *block.buffers()])  # fmt: skip
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name",
    [
        "preact-basic-projection",
        "preact-bottleneck-projection",
        "both",
        "drop-path",
        "eca-drop-path-projection",
        "no-norms-se",
    ],
)
def test_gradcheck(name: str, training: bool) -> None:
    """Against finite differences, which know nothing of autograd."""
    _, block = kind(name).pair(F64, training=training)
    names = [n for n, _ in block.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(6)
        given = dict(zip(names, values, strict=True))
        out: Tensor = torch.func.functional_call(block, given, (x,))
        return out

    x = kind(name).input(F64, shape=(3, 4, 3))
    assert block.why_not(x) is None
    inputs = (x, *(p.detach().clone().requires_grad_() for p in block.parameters()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


# ---------------------------------------------------------------- gates and what is not fused


class _Doubling(nn.Module):
    """A gate of somebody else's."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 * x.mean((2, 3), keepdim=True))


def _se_block(**options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(1)
    block = SEBasicBlock(8, 8, **{"attention": squeeze, **options}).double()
    return twin(block), block, kind("se-basic").input(F64)


def test_a_gate_may_be_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_GATES", dict(factors._GATES))
    stock, block, x = _se_block(attention=lambda channels: _Doubling())
    assert block.why_not() == "attention is a _Doubling, which is not fused"
    assert_same(step(block, x), step(stock, x))
    for cls in (_Doubling, f"{_Doubling.__module__}._Doubling"):
        register_gate(cls, lambda module, mean: 2 * mean)
        assert block.why_not(x) is None
        assert_same(step(block, x), step(stock, x))
        del factors._GATES[cls]


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 7, 6), ()], ids=str)
def test_a_factor_of_another_shape_is_broadcast(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "_GATES", dict(factors._GATES))
    factor = torch.rand(shape, dtype=F64)

    class Fixed(_Doubling):
        def forward(self, x: Tensor) -> Tensor:
            return x * factor

    stock, block, x = _se_block(attention=lambda channels: Fixed())
    register_gate(Fixed, lambda module, mean: factor)
    with FusedCalls() as calls:
        found = step(block, x)
    assert calls.forward >= 2
    assert_same(found, step(stock, x))


def test_hooks_within_a_gate_are_called() -> None:
    stock, block, x = _se_block()
    seen: list[torch.Size] = []
    for m in (stock, block):
        m.attention.fc2.register_forward_hook(
            lambda module, args, out: seen.append(out.shape) or out / 2
        )
    with FusedCalls() as calls:
        found = step(block, x)
    assert calls.forward == 2 and seen == [(8, 8, 1, 1)]
    assert_same(found, step(stock, x))


def _hooked(block: nn.Module) -> None:
    block.attention.register_forward_hook(lambda module, args, out: out / 2)


def _replaced(block: nn.Module) -> None:
    block.attention.forward = lambda x: x / 2


def _subclass(block: nn.Module) -> None:
    block.attention.__class__ = type("Mine", (SqueezeExcitation,), {"forward": lambda s, x: x / 2})


def _drop_hooked(block: nn.Module) -> None:
    block.drop_path.register_forward_hook(lambda module, args, out: out / 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "attention carries hooks"),
        (_replaced, "attention has its forward replaced"),
        (_subclass, "attention is a Mine, which is not fused"),
        (_drop_hooked, "drop_path carries hooks"),
    ],
)
def test_what_runs_as_it_is(change: Callable[[nn.Module], None], reason: str) -> None:
    stock, block, x = _se_block(drop_path=0.4)
    for m in (stock, block):
        change(m)
    assert block.why_not() == reason
    with FusedCalls() as calls:
        found = seeded(block, x)
    assert calls.forward == 0
    assert_same(found, seeded(stock, x))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: WideBasicBlock(8, 8, dropout=nn.AlphaDropout(0.1)),
         "dropout is a AlphaDropout, which is not fused"),
        (lambda: PreActBasicBlock(8, 8, norm_layer=lambda c: nn.GroupNorm(2, c)),
         "bn1 is a GroupNorm, not a BatchNorm2d"),
        (lambda: PreActBasicBlock(8, 8, norm_layer=nn.Identity),
         "relu changes the block's input in place"),
        (lambda: PreActBasicBlock(8, 8, downsample=nn.Sequential(nn.BatchNorm2d(8))),
         "downsample.0 is a BatchNorm2d, not a Conv2d"),
    ],
)  # fmt: skip
def test_reasons(make: Callable[[], nn.Module], reason: str) -> None:
    assert make().why_not() == reason


def test_an_input_that_does_not_fit_raises_torchs_error() -> None:
    for each in (kind("preact-basic"), kind("se-basic")):
        stock, block = each.pair()
        for x in (torch.randn(2, 5, 4, 4), torch.randn(8, 4, 4)):
            assert raised(lambda: block(x)) == raised(lambda: stock(x))  # noqa: B023


def test_torchvisions_gate_and_stochastic_depth(torchvision_or_skip: Any) -> None:
    from torchvision.ops import SqueezeExcitation as Theirs
    from torchvision.ops import StochasticDepth

    for mode in ("row", "batch"):
        depth = StochasticDepth(0.4, mode)
        stock, block, x = _se_block(attention=lambda c: Theirs(c, 4), drop_path=depth)
        assert block.why_not(x) is None
        assert_same(seeded(block, x), seeded(stock, x))
    block.attention.avgpool.register_forward_hook(lambda module, args, out: None)
    assert block.why_not(x) == "attention does more than pool in its avgpool"


def test_constructors() -> None:
    for cls in (PreActBasicBlock, PreActBottleneck):
        with pytest.raises(ValueError, match="shortcut must be one of input, activated"):
            cls(8, 8, shortcut="output")
    with pytest.raises(ValueError, match="groups=1"):
        PreActBasicBlock(8, 8, groups=2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        DropPath(1.5)
    with pytest.raises(ValueError, match="odd"):
        EfficientChannelAttention(8, 4)
    sizes = {c: EfficientChannelAttention(c).conv.kernel_size[0] for c in (8, 64, 256, 512, 2048)}
    assert sizes == {8: 3, 64: 3, 256: 5, 512: 5, 2048: 7}
    assert SqueezeExcitation(64).fc1.out_channels == 4
    assert SqueezeExcitation(8).fc1.out_channels == 1
    assert repr(DropPath(0.5)) == "DropPath(p=0.5)"


def test_drop_path_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = DropPath(0.25)(torch.ones(4000, 2, 1, 1))
    assert out.unique().tolist() == [0.0, torch.tensor(1 / 0.75).item()]
    assert abs(out.mean() - 1) < 0.05
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(DropPath(1.0)(torch.ones(4, 2)), torch.zeros(4, 2))


def test_state_and_report() -> None:
    for each in (*KINDS, *RANDOM):
        stock, block = each.pair()
        block.load_state_dict(stock.state_dict())
        report = fastres.explain(nn.Sequential(block))
        assert (report.fused, report.unfused) == (1, 0), str(report)
        assert type(block).__doc__ and "Args:" in type(block).__doc__


# ---------------------------------------------------------------- planted faults


def _once(real: Any) -> Any:
    """A mask drawn once and kept."""
    kept: dict[Any, Tensor] = {}

    def draw(module: nn.Module, x: Tensor, shape: Any, fmt: Any) -> Tensor:
        key = (type(module), tuple(shape))
        if key not in kept:
            kept[key] = real(module, x, shape, fmt)
        return kept[key]

    return draw


def _without_mean_path(real: Any) -> Any:
    """The open end's gradient without what the gate's mean adds."""
    return lambda block, grad, grad_mean, *more: real(block, grad, None, *more)


def _other_source(real: Any) -> Any:
    """A shortcut from the first activation where it starts at the input, and the reverse."""

    def run(self: _Forward, x: Tensor, residual: Tensor | None) -> list[Tensor]:
        shortcut = {"input": "activated", "activated": "input"}[self.block.shortcut]
        found: list[Tensor] = real(_moved(self, shortcut), x, residual)
        return found

    return run


def _moved(run: Any, shortcut: str) -> Any:
    run.block = run.block._replace(shortcut=shortcut)
    return run


def _without_factor(real: Any) -> Any:
    return lambda z, factor, overwrite=False: z


def _without_shortcut(real: Any) -> Any:
    return lambda self, incoming, accumulate: real(self, incoming, None)


def _without_gate(real: Any) -> Any:
    """The shortcut's gradient as if nothing stood behind the sum."""

    def end(self: _Backward, grad_out: Tensor, gate: Any) -> Any:
        found = real(self, grad_out, gate)
        self.end = Gated(grad_out, gate._replace(kind="none", tensor=None, act="none"))
        return found

    return end


@dataclass(frozen=True)
class Planted:
    """A fault: what is replaced, by what, and the kinds in which it acts."""

    name: str
    owner: Any
    attribute: str
    make: Callable[[Any], Any]
    kinds: tuple[str, ...]


FAULTS = [
    Planted("factor forgotten in backward", backward, "scaled", _without_factor,
            ("wide-dropout", "drop-path", "se-basic")),
    Planted("factor's gradient halved", _Backward, "_factor_gradient",
            lambda f: lambda s, i, g, factor: f(s, i, g, factor) / 2,
            ("se-basic", "eca-bottleneck-pooled")),
    Planted("the mean's path forgotten", fused, "run_open",
            lambda f: lambda *a: (*(o := f(*a))[:2], o[2].detach()),
            ("se-basic", "eca-bottleneck-pooled")),
    Planted("the mean's gradient not spread", op, "run_backward", _without_mean_path,
            ("se-basic",)),
    Planted("mask reused", fused, "draw", _once, ("wide-dropout", "drop-path", "se-drop-path")),
    Planted("shortcut from the wrong place", _Forward, "run", _other_source,
            ("preact-basic", "preact-basic-activated", "preact-bottleneck-projection")),
    Planted("leading norm's gradient without the shortcut's", _Backward, "_without_convolution",
            _without_shortcut, ("preact-basic",)),
    Planted("residual's gradient forgotten", _Backward, "_residual_gradient",
            lambda f: lambda s: None,
            ("preact-basic-activated", "preact-bottleneck-projection", "wide-projection")),
    Planted("end gate left open for the shortcut", _Backward, "_scaled_end", _without_gate,
            ("drop-path",)),
    Planted("factor forgotten in forward", compose, "scaled", _without_factor,
            ("both", "wide-dropout")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        pytest.param(p, n, id=f"{p.name}, {n}")
        for p, n in itertools.chain.from_iterable([(p, n) for n in p.kinds] for p in FAULTS)
    ],
)
def test_fault_is_found(planted: Planted, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        stock, block = kind(name).pair(F64)
        with fastres.use_backend("aten"):
            found = seeded(block, kind(name).input(F64))
        assert_same(found, seeded(stock, kind(name).input(F64)))

    run()
    real = getattr(planted.owner, planted.attribute)
    monkeypatch.setattr(planted.owner, planted.attribute, planted.make(real))
    with pytest.raises((AssertionError, RuntimeError)):
        run()
