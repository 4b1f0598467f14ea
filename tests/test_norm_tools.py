"""Tools that act on every batch norm of a model leave what stands around it: the ReLU behind."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import load_torchvision
from module_parity import FusedCalls, assert_same, randomise, step
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres.nn import BNAddReLU, BNReLU


class _Net(nn.Module):
    """A convolution, and a norm with what follows it: ours, or torch's modules."""

    def __init__(self, fused: bool, adds: bool) -> None:
        super().__init__()
        self.fused, self.adds = fused, adds
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = (BNAddReLU if adds else BNReLU)(6) if fused else nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        given = (y, y) if self.adds else (y,)
        if self.fused:
            out: Tensor = self.norm(*given)
            return out
        z = self.norm(y)
        return F.relu(z + y if self.adds else z)


def _frozen_by_timm(net: nn.Module) -> nn.Module:
    with contextlib.suppress(ImportError):
        load_torchvision()  # Which timm imports, and whose compiled module may not fit.
    return pytest.importorskip("timm.layers").freeze_batch_norm_2d(net)


def _folded_by_fx(net: nn.Module) -> nn.Module:
    from torch.fx.experimental import optimization

    return optimization.fuse(net.eval())


def _swapped(net: nn.Module) -> nn.Module:
    """As tools do that walk over named_modules and put a module of theirs in a norm's place."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            *path, last = name.split(".")
            setattr(net.get_submodule(".".join(path)), last, nn.InstanceNorm2d(6))
    return net


def _stopped(net: nn.Module) -> nn.Module:
    """mmdetection's norm_eval, and frozen parameters."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return net


TOOLS: list[Callable[[nn.Module], nn.Module]] = [
    _frozen_by_timm,
    nn.SyncBatchNorm.convert_sync_batchnorm,
    torch.func.replace_all_batch_norm_modules_,
    _folded_by_fx,
    _swapped,
    _stopped,
]


@pytest.mark.parametrize("adds", [False, True], ids=["bn-relu", "bn-add-relu"])
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__.strip("_"))
def test_a_tool_changes_the_norm_and_nothing_else(
    tool: Callable[[nn.Module], nn.Module], adds: bool
) -> None:
    fused, stock = _twins(adds)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    fused, stock = (tool(net) or net for net in (fused, stock))
    # The stock SyncBatchNorm takes no CPU tensor in training.
    for net in (fused, stock):
        net.eval()
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d) and tool is not _stopped:
                norm.train()
    out, expected = fused(x), stock(x)
    assert bool((expected == 0).any()), "a ReLU is there"
    torch.testing.assert_close(out, expected)


def _twins(adds: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    fused = randomise(_Net(True, adds)).double().eval()
    stock = _Net(False, adds).double().eval()
    state = {name.replace("norm.bn.", "norm."): t for name, t in fused.state_dict().items()}
    stock.load_state_dict(state)
    return fused, stock


def test_a_norm_to_be_folded_by_itself_is_refused() -> None:
    """What is no batch norm cannot be taken for one, and lose its ReLU in silence."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    net = _Net(True, False).eval()
    assert not isinstance(net.norm, nn.BatchNorm2d)
    with pytest.raises(AttributeError):
        fuse_conv_bn_eval(net.conv, net.norm)


@pytest.mark.parametrize("adds", [False, True])
def test_the_state_of_a_batch_norm_loads(adds: bool) -> None:
    fused, stock = _twins(adds)
    assert [name for name in fused.state_dict() if name.endswith("weight")][1] == "norm.bn.weight"
    other = _Net(True, adds).double().eval()
    other.load_state_dict(stock.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(other(x), stock(x))
    other.load_state_dict(fused.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in stock.state_dict().items() if "mean" not in k})


def _hook(module: nn.Module) -> None:
    module.bn.register_forward_hook(lambda m, args, out: out - 1)


def _relu_gone(module: nn.Module) -> None:
    module.relu = nn.Identity()


def _other_activation(module: nn.Module) -> None:
    module.relu = nn.Hardtanh()


def _other_norm(module: nn.Module) -> None:
    module.bn = nn.GroupNorm(2, 6).double()


@pytest.mark.parametrize(
    ("change", "calls"), [(_hook, 0), (_relu_gone, 1), (_other_activation, 0), (_other_norm, 0)]
)
@pytest.mark.parametrize("train", [True, False])
def test_children_are_looked_at_when_called(
    change: Callable[[nn.Module], None], calls: int, train: bool
) -> None:
    for cls, count in ((BNReLU, 1), (BNAddReLU, 2)):
        module = randomise(cls(6)).double().train(train)
        change(module)
        twin = copy.deepcopy(module)
        inputs = [torch.randn(3, 6, 4, 4, dtype=torch.float64) for _ in range(count)]
        with FusedCalls() as counted:
            found = step(module, *inputs)
        assert counted.forward == calls
        twin.forward = lambda x, r=0, m=twin: m.relu(m.bn(x) + r)
        assert_same(found, step(twin, *inputs))


def test_what_is_built_of_them_is_all_of_torchs_arguments() -> None:
    for train, affine, track in itertools.product([True, False], repeat=3):
        module = BNReLU(6, 1e-3, 0.3, affine, track, dtype=torch.float64).train(train)
        x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
        twin = nn.BatchNorm2d(6, 1e-3, 0.3, affine, track, dtype=torch.float64).train(train)
        torch.testing.assert_close(module(x), twin(x).relu())
        torch.testing.assert_close(module.bn.state_dict(), twin.state_dict())
    with fastres.use_backend("aten"):
        assert module(x).shape == x.shape
