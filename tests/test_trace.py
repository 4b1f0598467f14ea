"""Blocks that no library has are recognised by what their forward does."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handwritten import (
    Activated,
    Attention,
    ByDetection,
    ByDetectron,
    Cifar,
    Dense,
    DoubleConv,
    IntoTheInput,
    Modes,
    OptionA,
    PreActivation,
    Textbook,
    ThreeBranches,
    ThreeConvolutions,
    Values,
    Wide,
    WithSqueeze,
    WritesIntoWhatIsRead,
    vgg,
)
from module_parity import FusedCalls, assert_same, assert_two_x, randomise, step
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres.convert.traced import bindings_of

#: How each is made, and how many fused operations it is: a gate's block is two and its projection.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "textbook": (lambda: Textbook(4, 4), 1),
    "textbook-projection": (lambda: Textbook(4, 6, 2), 1),
    "textbook-bias": (lambda: Textbook(4, 6, 2, bias=True), 1),
    "cifar": (lambda: Cifar(4, 4), 1),
    "cifar-pooled": (lambda: Cifar(4, 6, 2), 1),
    "bottleneck": (lambda: ThreeConvolutions(4, 2), 1),
    "bottleneck-projection": (lambda: ThreeConvolutions(4, 3, 2), 1),
    "pre-activation": (lambda: PreActivation(4, 4), 1),
    "pre-activation-projection": (lambda: PreActivation(4, 6, 2), 1),
    "wide": (lambda: Wide(4, 4), 1),
    "wide-projection": (lambda: Wide(4, 6, 2), 1),
    "squeeze": (lambda: WithSqueeze(4, 4), 2),
    "squeeze-known": (lambda: WithSqueeze(4, 6, 2, known=True), 3),
    "double-conv": (lambda: DoubleConv(4, 6), 1),
    "vgg": (lambda: vgg(4, 6), 2),
    "option-a": (lambda: OptionA(4, 6), 1),
    "dense": (lambda: Dense(4, 3), 1),
    "into-the-input": (lambda: IntoTheInput(4, 4), 1),
    "modes": (lambda: Modes(4, 4), 1),
    "detectron2": (lambda: ByDetectron(4, 6, 2), 1),
    "mmdetection": (lambda: ByDetection(4, 6, 2), 1),
    "three-branches": (lambda: ThreeBranches(4), 2),
    "writes-into-what-is-read": (lambda: WritesIntoWhatIsRead(4), 1),
}
KINDS = pytest.mark.parametrize("kind", BLOCKS)


def made(kind: str) -> nn.Module:
    return randomise(BLOCKS[kind][0]()).double()


def twins(kind: str) -> tuple[nn.Module, nn.Module]:
    """A converted block and what it was."""
    stock = made(kind)
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    return fused, stock


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 4, 7, 7, dtype=dtype)


def assert_two_x_under_autocast(stock: nn.Module) -> None:
    """A converted copy of a float32 block is as near to the truth as the block."""
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    truth, x = copy.deepcopy(stock).double(), images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = step(fused, x), step(stock, x)
    assert_two_x(found, expected, step(truth, x.double()))


def seeded(module: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """A step with random numbers that are always the same."""
    torch.manual_seed(3)
    return step(module, x, **options)


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize(
    "fmt", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@KINDS
def test_parity(kind: str, dtype: torch.dtype, fmt: torch.memory_format, mode: str) -> None:
    if kind == "into-the-input" and mode != "inference":
        pytest.skip("a leaf that wants a gradient must not be written into")
    fused, stock = [m.train(mode == "train").to(dtype, memory_format=fmt) for m in twins(kind)]
    x = images(dtype).to(memory_format=fmt)
    with FusedCalls() as calls:
        found = seeded(fused, x, backward=mode != "inference")
    assert calls.forward == BLOCKS[kind][1]
    assert_same(found, seeded(stock, x, backward=mode != "inference"))


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.01)


#: Each with the number of fused operations of a block.
ACTIVATIONS: dict[str, tuple[Any, int]] = {
    "silu": (nn.SiLU(inplace=True), 1), "f-silu": (F.silu, 1), "gelu": (nn.GELU(), 1),
    "gelu-tanh": (nn.GELU(approximate="tanh"), 1), "f-gelu": (F.gelu, 1),
    "leaky": (nn.LeakyReLU(), 1), "f-leaky": (leaky, 1), "relu6": (nn.ReLU6(inplace=True), 1),
    "f-relu6": (F.relu6, 1), "hardswish": (nn.Hardswish(), 1), "f-hardswish": (F.hardswish, 1),
    "steep-leaky": (nn.LeakyReLU(0.2), 2), "f-steep": (lambda x: F.leaky_relu(x, 0.2), 2),
    "mish": (nn.Mish(), 2), "twice": (nn.Sequential(nn.ReLU(), nn.SiLU()), 1),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str, mode: str) -> None:
    """What a kernel knows is fused; around anything else the rest is."""
    stock = randomise(Activated(4, 6, 2, ACTIVATIONS[act][0])).double().train(mode == "train")
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    with FusedCalls() as calls:
        found = step(fused, x, backward=mode != "inference")
    assert calls.forward == ACTIVATIONS[act][1]
    assert_same(found, step(stock, x, backward=mode != "inference"))


@pytest.mark.parametrize("act", ["silu", "gelu", "leaky", "relu6", "hardswish"])
def test_activations_in_lower_precision(act: str) -> None:
    stock = randomise(Activated(4, 6, 2, ACTIVATIONS[act][0]))
    assert_two_x_under_autocast(stock)


@pytest.mark.parametrize(
    ("name", "value"), [("negative_slope", 0.2), ("approximate", "tanh"), ("inplace", True)]
)
def test_settings_of_activations(name: str, value: Any) -> None:
    """They may change after the conversion."""
    act = {"negative_slope": nn.LeakyReLU, "approximate": nn.GELU, "inplace": nn.Hardswish}[name]
    stock = randomise(Activated(4, 4, act=act())).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    assert_same(step(fused, x), step(stock, x))
    for module in (fused, stock):
        setattr(module.act, name, value)
    assert_same(step(fused, x), step(stock, x))


@pytest.mark.parametrize("owner", [nn.SiLU, F], ids=["class", "function"])
def test_replaced_activations(owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = randomise(Activated(4, 4, act=nn.SiLU())).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    assert_same(step(fused, x), step(stock, x))
    if owner is F:
        monkeypatch.setattr(F, "silu", lambda x, inplace=False: x * 2)
    else:
        monkeypatch.setattr(owner, "forward", lambda self, x: x * 3)
    assert_same(step(fused, x), step(stock, x))


def _weight(module: Any) -> None:
    module.conv1.weight = nn.Parameter(module.conv1.weight.detach() * 2)


def _all_parameters(module: Any) -> None:
    weight = nn.Parameter(module.conv1.weight.detach() * 2)
    module.conv1.__dict__["_parameters"] = {"weight": weight, "bias": None}


def _settings(module: Any) -> None:
    module.conv2.padding, module.conv2.dilation = (2, 2), (2, 2)


def _with_bias(module: Any) -> None:
    module.conv1.register_parameter("bias", nn.Parameter(torch.ones(3).double()))


def _act_within(module: Any) -> None:
    module.conv3.activation = nn.Mish()


def _hook_within(module: Any) -> None:
    module.conv2.register_forward_hook(lambda m, args, out: out * 2)


def _weight_norm(module: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(module.conv2)


@pytest.mark.parametrize(
    "change",
    [_weight, _all_parameters, _settings, _with_bias, _act_within, _hook_within, _weight_norm],
    ids=lambda f: f.__name__,
)
def test_changes_to_functional_convolutions(change: Callable[[Any], None]) -> None:
    stock = randomise(ByDetectron(4, 6, 2)).double()
    if change is _with_bias:
        for conv in (stock.conv1, stock.conv2, stock.conv3, stock.shortcut):
            conv.bias = None
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    with FusedCalls() as calls:
        assert_same(step(fused, x), step(stock, x))
    assert calls.forward > 0
    for module in (fused, stock):
        torch.manual_seed(2)
        change(module)
    for train in (True, False):
        assert_same(step(fused.train(train), x), step(stock.train(train), x))


def _spatial(z: Tensor) -> Tensor:
    return z * torch.sigmoid(z.mean(1, keepdim=True))


def _full(z: Tensor) -> Tensor:
    return torch.sigmoid(-z) * z


def _squared(z: Tensor) -> Tensor:
    return z * z


def _expanded(z: Tensor) -> Tensor:
    return torch.mul(z, F.adaptive_avg_pool2d(z, 1).tanh().expand_as(z))


def _of_the_batch(z: Tensor) -> Tensor:
    return z.mul(z.mean((0, 2, 3), keepdim=True))


def _scalar(z: Tensor) -> Tensor:
    return z * z.mean()


def _without_batch(z: Tensor) -> Tensor:
    return z * z.mean((0, 2, 3), keepdim=True).squeeze(0)


def _narrower(z: Tensor) -> Tensor:
    """In another dtype than a float64 z."""
    return z * z.mean((2, 3), keepdim=True).float()


def _in_place(z: Tensor) -> Tensor:
    factor = torch.sigmoid(z.detach().mean((2, 3), keepdim=True))
    z *= factor
    return z


def _dropped(z: Tensor) -> Tensor:
    return F.dropout(z * torch.sigmoid(z.mean((2, 3), keepdim=True)), 0.5, training=True)


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("attend", "calls"),
    [
        (_spatial, 2), (_full, 2), (_squared, 1), (_expanded, 2), (_of_the_batch, 2), (_scalar, 1),
        (_without_batch, 1), (_narrower, None), (_in_place, 1), (_dropped, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_attention(attend: Any, calls: int | None, dtype: torch.dtype, mode: str) -> None:
    """What multiplies a branch by a factor of itself is fused with the sum behind it."""
    stock: Any = randomise(Attention(4, 4)).to(dtype).train(mode == "train")
    stock.attend = attend
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images(dtype)
    with FusedCalls() as counted:
        found = seeded(fused, x, backward=mode != "inference")
    assert counted.forward == (calls or 1 + (dtype is torch.float32))
    assert_same(found, seeded(stock, x, backward=mode != "inference"))


@pytest.mark.parametrize("kind", ["squeeze", "attention"])
def test_attention_in_lower_precision(kind: str) -> None:
    stock: Any = randomise(WithSqueeze(4, 4) if kind == "squeeze" else Attention(4, 4))
    stock.attend = _expanded
    assert_two_x_under_autocast(stock)


class _Scaled(ByDetectron):
    """A weight that is computed, and one of another module."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1.norm(F.conv2d(x, self.conv1.weight * 2)))
        y = F.relu(self.conv2.norm(F.conv2d(y, self.conv2.weight, self.conv1.norm.bias, 1, 1)))
        return self.conv3.norm(F.conv2d(y, self.conv3.weight, padding="same"))


def test_functional_convolutions_of_other_weights() -> None:
    stock = randomise(_Scaled(4, 6)).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    assert_same(step(fused, x), step(stock, x))


def test_what_a_block_writes_into_is_written_into() -> None:
    fused, stock = twins("into-the-input")
    x = images()
    mine, theirs = x.clone(), x.clone()
    with torch.no_grad():
        fused(mine), stock(theirs)
    torch.testing.assert_close(mine, theirs)
    assert not torch.equal(mine, x)


@KINDS
def test_what_survives(kind: str, tmp_path: Any) -> None:
    stock = made(kind)
    fused = copy.deepcopy(stock)
    cls, attributes, keys = type(fused), dir(fused), list(fused.state_dict())
    parameters = list(fused.parameters())
    report = fastres.convert(fused)
    assert report.changed >= 1 and fastres.convert(fused).changed == 0
    assert all(p is q for p, q in zip(parameters, fused.parameters(), strict=True))
    assert keys == list(fused.state_dict()) and isinstance(fused, cls)
    new = type(fused)
    assert (new.__name__, new.__qualname__, new.__module__) == (
        cls.__name__, cls.__qualname__, cls.__module__
    )  # fmt: skip
    assert {name for name in dir(fused) if not name.startswith("_")} <= {*attributes}
    assert inspect.signature(fused.forward) == inspect.signature(stock.forward)
    if kind != "option-a":  # A lambda is not pickled.
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        for twin in (pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False)):
            assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
            assert_as(twin, stock, BLOCKS[kind][1])
    twin = copy.deepcopy(fused)
    assert type(twin) is type(fused)
    assert_as(twin, stock, BLOCKS[kind][1])
    assert fastres.revert(fused).fused == 0
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    assert_as(fused, stock, 0)


def assert_as(fused: nn.Module, stock: nn.Module, calls: int) -> None:
    """The same output, in so many fused operations."""
    x = images()
    with torch.no_grad(), FusedCalls() as counted:
        torch.manual_seed(1)
        out = fused(x.clone())
    assert counted.forward == calls
    with torch.no_grad():
        torch.manual_seed(1)
        torch.testing.assert_close(out, stock(x.clone()))


def test_arguments_by_keyword() -> None:
    fused, stock = twins("textbook")
    x = images()
    with FusedCalls() as calls:
        torch.testing.assert_close(fused(x=x), stock(x=x))
    assert calls.forward == 1


def test_training_goes_on() -> None:
    """Steps in both modes, in turn; what was traced in one does not answer in the other."""
    fused, stock = twins("modes")
    x = images()
    for _ in range(2):
        for train in (True, False):
            assert_same(step(fused.train(train), x), step(stock.train(train), x))


# ---------------------------------------------------------------- what is not as it was traced


class _Half(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def _hook(module: Any) -> None:
    module.bn2.register_forward_hook(lambda m, args, out: out * 2)


def _pre_hook(module: Any) -> None:
    module.conv2.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def _child(module: Any) -> None:
    module.bn1 = nn.Sequential(nn.Identity(), _Half()).double()


def _child_of_the_shortcut(module: Any) -> None:
    module.shortcut.append(_Half())


def _forward_of_a_child(module: Any) -> None:
    module.bn1.forward = lambda x: x + 1


def _conv_forward(module: Any) -> None:
    module.conv1._conv_forward = lambda x, weight, bias: F.conv2d(x, weight * 2, bias, 2, 1)


def _own_forward(module: Any) -> None:
    module.forward = lambda x: module.bn1(module.conv1(x))


def _stride(module: Any) -> None:
    module.conv1.stride = (1, 1)
    module.shortcut[0].stride = (1, 1)


def _parametrised(module: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(module.conv1)


def _eval_of_a_child(module: Any) -> None:
    module.bn1.eval()


def _frozen(module: Any) -> None:
    module.bn2.requires_grad_(False)


def _new_parameter(module: Any) -> None:
    module.conv2.weight = nn.Parameter(module.conv2.weight.detach() * 2)


@pytest.mark.parametrize("when", ["before", "after", "after a call"])
@pytest.mark.parametrize(
    "change",
    [
        _hook, _pre_hook, _child, _child_of_the_shortcut, _forward_of_a_child, _conv_forward,
        _own_forward, _stride, _parametrised, _eval_of_a_child, _frozen, _new_parameter,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_changes_to_children(change: Callable[[Any], None], when: str) -> None:
    stock = made("textbook-projection")
    fused = copy.deepcopy(stock)
    x = images()
    if when != "before":
        fastres.convert(fused)
    if when == "after a call":
        assert_same(step(fused, x), step(stock, x))
    for module in (fused, stock):
        torch.manual_seed(2)
        change(module)
    if when == "before":
        fastres.convert(fused)
    for train in (True, False):
        assert_same(step(fused.train(train), x), step(stock.train(train), x))
    assert str(fastres.explain(fused))


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_forward_of_a_class(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = made("textbook")
    fused = copy.deepcopy(stock)
    x = images()
    if when == "after":
        fastres.convert(fused)
        assert_same(step(fused, x), step(stock, x))
    monkeypatch.setattr(Textbook, "forward", lambda self, x: self.bn2(self.conv2(x)).relu() * 3)
    if when == "before":
        fastres.convert(fused)
    with FusedCalls() as calls:
        found = step(fused, x)
    assert calls.forward == 1
    assert_same(found, step(stock, x))


def test_the_forward_of_a_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, stock = twins("option-a")
    x = images()
    assert_same(step(fused, x), step(stock, x))
    monkeypatch.setattr(type(stock.shortcut), "forward", lambda self, x: self.function(x) + 1)
    assert_same(step(fused, x), step(stock, x))


class _Depends(Textbook):
    """Reads attributes, a name of this file, a variable around it and a table."""

    factor = 2
    table = {"shift": {"by": 1.0}}

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.options = {"scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) * self.factor + SHIFT
        return out * self.options["scale"] + self.table["shift"]["by"]


SHIFT = 3.0


@pytest.mark.parametrize("what", ["instance", "class", "global", "option", "table", "function"])
def test_what_a_forward_reads(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = randomise(_Depends()).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    with FusedCalls() as calls:
        found = step(fused, x)
    assert calls.forward == 1
    before = step(stock, x)
    assert_same(found, before)
    if what == "instance":
        fused.factor = stock.factor = 5
    elif what == "class":
        monkeypatch.setattr(_Depends, "factor", 5)
    elif what == "global":
        monkeypatch.setitem(globals(), "SHIFT", 5.0)
    elif what == "option":
        for module in (fused, stock):
            module.options["scale"] = 5.0
    elif what == "table":
        monkeypatch.setitem(_Depends.table["shift"], "by", 5.0)
    else:
        monkeypatch.setattr(torch.Tensor, "__mul__", torch.Tensor.__mul__)
        monkeypatch.setattr(F, "relu", lambda x, inplace=False: torch.tanh(x))
    found, expected = step(fused, x), step(stock, x)
    assert_same(found, expected)
    assert not torch.equal(expected["out"], before["out"])


class _Logged(Tensor):
    """A subclass that a forward may tell apart."""


def test_subclasses_of_tensors_go_their_own_way() -> None:
    class Telling(Textbook):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(-x if isinstance(x, _Logged) else x)

    stock = randomise(Telling(4, 4)).double().eval()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    for given in (x, x.as_subclass(_Logged)):
        torch.testing.assert_close(fused(given), stock(given))


def test_a_method_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, stock = twins("bottleneck")
    x = images()
    before = step(stock, x)
    assert_same(step(fused, x), before)
    monkeypatch.setattr(Tensor, "relu", lambda self: torch.tanh(self))
    expected = step(stock, x)
    assert_same(step(fused, x), expected)
    assert not torch.equal(before["out"], expected["out"])


def test_a_module_that_changes_at_every_call() -> None:
    """After a while its forward runs as it is, and is not traced again."""
    fused, stock = twins("textbook")
    x = images()
    for i in range(70):
        for module in (fused, stock):
            module.shortcut = nn.Sequential(*[nn.Identity() for _ in range(i % 3)])
    torch.testing.assert_close(fused(x), stock(x))


# ---------------------------------------------------------------- what is left alone


class _Random(Textbook):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(())


class _Coin(Textbook):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if COIN.random() < 2 else x


class _NoGrad(Textbook):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.bn1(self.conv1(x))
        return super().forward(x)


class _Counts(Textbook):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class _Keeps(Textbook):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.seen.append(out)
        return out


COLLECTED: list[Any] = []


class _Collects(Textbook):
    def forward(self, x: Tensor) -> Tensor:
        COLLECTED.append(x.shape)
        return super().forward(x)


class _Fills(Textbook):
    table: dict[str, dict[str, Any]] = {"of the class": {}}

    def forward(self, x: Tensor) -> Tensor:
        self.table["of the class"]["out"] = out = super().forward(x)
        return out


class _Prints(Textbook):
    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return super().forward(x)


class _Asks(Textbook):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else x


class _OfTypes(Textbook):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if type(x) is Tensor else -x)


COIN = random.Random(1)


REFUSED = {
    Values: "has control flow that depends on values",
    _Random: "calls torch's randn on no input of its own",
    _Coin: "uses the module random",
    _NoGrad: "calls torch.",
    _Counts: "sets calls",
    _Keeps: "changes a list or dictionary",
    _Collects: "changes a list or dictionary",
    _Fills: "changes a list or dictionary",
    _Prints: "calls print",
    _Asks: "calls is_grad_enabled",
    _OfTypes: "calls type",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_what_is_left_alone(cls: type[nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    """A graph would not do what these forwards do: they run as they are, with a reason."""
    stock = randomise(cls(4, 4)).double()
    fused = copy.deepcopy(stock)
    before = copy.deepcopy(fused.__dict__)
    (row,) = fastres.convert(fused).rows
    assert not row.fused and row.runs == 0 and row.reason.startswith(REFUSED[cls])
    assert type(fused) is cls and capsys.readouterr().out == ""
    assert COLLECTED == [] and _Fills.table == {"of the class": {}}
    assert getattr(fused, "seen", []) == [] and fused.__dict__.keys() == before.keys()
    x = images()
    torch.manual_seed(5)
    found = step(fused, x)
    torch.manual_seed(5)
    assert_same(found, step(stock, x))
    COLLECTED.clear()
    _Fills.table["of the class"].clear()


def test_isinstance_of_a_tensor_is_answered() -> None:
    class Either(Textbook):
        def forward(self, x: Any) -> Tensor:
            tensors = [x] if isinstance(x, Tensor) else x
            return super().forward(torch.cat(tensors, 1))

    stock = randomise(Either(4, 4)).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    for given in (x, [x[:, :2], x[:, 2:]], (x[:, :3], x[:, 3:])):
        with FusedCalls() as calls:
            torch.testing.assert_close(fused(given), stock(given))
        assert calls.forward == 1


def test_nothing_is_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found at conversion answers the first call, that of the other mode its first."""
    fused = nn.Sequential(made("vgg"), Textbook(6, 6).double())
    fastres.convert(fused)
    from fastres.convert import traced

    traces: list[type] = []

    def counting(module: nn.Module, *args: Any) -> Any:
        traces.append(type(module))
        return make_plan(module, *args)

    make_plan = traced.make_plan
    monkeypatch.setattr(traced, "make_plan", counting)
    for train, count in ((True, 0), (True, 0), (False, 2), (True, 2), (False, 2)):
        fused.train(train)(images())
        assert len(traces) == len({*traces}) == count


def test_a_given_residual_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs a block that adds a given tensor is prepared once for each kind of tensors."""
    from fastres.nn import bound

    fused, stock = twins("option-a")
    prepared: list[Any] = []

    def counting(*args: Any) -> Any:
        prepared.append(args)
        return prepare(*args)

    prepare = bound.prepare
    monkeypatch.setattr(bound, "prepare", counting)
    x = images()
    for _ in range(3):
        assert_same(step(fused, x), step(stock, x))
    assert len(prepared) == 1
    # A residual of another format is another kind.
    fused.shortcut.function = stock.shortcut.function = lambda x: F.pad(
        x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)
    ).contiguous(memory_format=torch.channels_last)
    assert_same(step(fused, x), step(stock, x))
    assert len(prepared) == 2


class Root(nn.Module):
    """Its argument is a list: only who calls it says what is in that."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs)

    def forward(self, values: list[Tensor]) -> Tensor:
        return F.relu(self.norm(self.conv(torch.cat(values, 1))))


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.root = Textbook(4, 4), Textbook(4, 4), Root(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        return self.root([left, self.right(left)])


def test_a_child_that_only_its_parent_can_trace() -> None:
    stock = randomise(Tree()).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    for train in (True, False):
        with FusedCalls() as calls:
            found = step(fused.train(train), x)
        assert calls.forward == 3
        assert_same(found, step(stock.train(train), x))


class _Doubled(nn.ReLU):
    """What calling it does is not in its forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


@pytest.mark.parametrize("where", ["sequential", "attribute"])
def test_a_call_of_its_own(where: str) -> None:
    if where == "attribute":
        stock: nn.Module = Activated(4, 4, act=_Doubled())
    else:
        stock = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), _Doubled(), nn.Conv2d(4, 4, 1))
    stock = randomise(stock).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    assert_same(step(fused, x), step(stock, x))


def test_assertions_are_kept() -> None:
    class Asserts(Textbook):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.shape[2] < 9, "too large")
            return super().forward(x)

    stock = randomise(Asserts(4, 4)).double()
    fused = copy.deepcopy(stock)
    fastres.convert(fused)
    x = images()
    with FusedCalls() as calls:
        assert_same(step(fused, x), step(stock, x))
    assert calls.forward == 1
    with pytest.raises(AssertionError, match="too large"):
        fused(torch.randn(2, 4, 9, 9, dtype=torch.float64))


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(made("textbook"), made("cifar"), fastres.BasicBlock(4, 4))
    classes = [type(m) for m in model.modules()]
    from fastres.convert import core

    bound: list[nn.Module] = []

    def failing(module: nn.Module, plan: Any) -> None:
        if bound:
            raise RuntimeError("half-way")
        bound.append(module)
        core_bind(module, plan)

    core_bind = core.bind
    monkeypatch.setattr(core, "bind", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        fastres.convert(model)
    assert bound and [type(m) for m in model.modules()] == classes


def test_reports() -> None:
    model = nn.Sequential(Activated(4, 4, act=nn.Mish()).double(), made("textbook"), Values(4, 4))
    assert {row.reason for row in fastres.explain(model).rows[:2]} == {"not converted"}
    rows = fastres.convert(model).rows
    assert [(row.name, row.fused, row.runs) for row in rows] == [
        ("0", False, 2), ("1", True, 1), ("2", False, 0),
    ]  # fmt: skip
    assert rows[0].reason == "act is a Mish, which is not fused"
    report = fastres.explain(model)
    assert (report.blocks, report.chains) == ((2, 3), (1, 1))
    assert "2 of 3 residual blocks and 1 of 1 chains fused" in str(report)
    assert "partly" in str(fastres.explain(model))
    assert rows[1].level and rows[1].backends["scale_shift_act"]


def test_a_hook_on_a_child_is_traced_once() -> None:
    """A child with hooks is called as it is: that holds for the calls that follow."""
    fused, stock = twins("textbook")
    for module in (fused, stock):
        _hook(module)
    for _ in range(3):
        x = images()
        assert_same(step(fused, x), step(stock, x))
    assert bindings_of(fused).traces == 2
