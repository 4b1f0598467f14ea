"""A block's input that the block in front can form again is not kept as well."""

from __future__ import annotations

import copy

import pytest
import torch
from module_parity import randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastres
from fastres.block import op
from fastres.testing import saved_bytes
from fastres.testing.saved import _nodes

ALWAYS, NEVER = 0, 1 << 60


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Tensors of a test are small."""
    monkeypatch.setattr(op, "LEAST_BYTES", ALWAYS)
    return monkeypatch


def projected(width: int, out: int, stride: int = 1) -> nn.Module:
    down = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return fastres.BasicBlock(width, out, stride, down)


def row(dtype: torch.dtype = torch.float32, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A projection, four identities, and a projection."""
    torch.manual_seed(0)
    blocks = [projected(6, 8), *[fastres.BasicBlock(8, 8) for _ in range(4)], projected(8, 4, 2)]
    return randomise(nn.Sequential(*blocks)).to(dtype)  # type: ignore[no-any-return]


def image(dtype: torch.dtype = torch.float32, channels: int = 6) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(2, channels, 6, 5, dtype=dtype).to(memory_format=torch.channels_last)
    return x.requires_grad_()


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input and of all parameters."""
    out: Tensor = net(x)
    return [*torch.autograd.grad(out.square().sum(), [x, *net.parameters()])]


@pytest.mark.parametrize("memory", ["balanced", "speed", "lean"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_bits(
    dtype: torch.dtype, layout: torch.memory_format, memory: str,
    of_any_size: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    net, found = row(dtype).to(memory_format=layout), []
    x = image(dtype).detach().contiguous(memory_format=layout).requires_grad_()
    for least in (ALWAYS, NEVER):
        of_any_size.setattr(op, "LEAST_BYTES", least)
        with fastres.use_memory(memory):
            found.append(gradients(copy.deepcopy(net), x))
    assert all([torch.equal(a, b) for a, b in zip(*found, strict=True)])


def test_every_other_input_of_a_row_is_kept(of_any_size: pytest.MonkeyPatch) -> None:
    """Behind a projection any input is formed again; behind an identity, where its own was kept."""
    net, x, kept = row(), image(), {}
    for least in (ALWAYS, NEVER):
        of_any_size.setattr(op, "LEAST_BYTES", least)
        kept[least] = saved_bytes(net, lambda: net(x))
    stand_in = 4
    one = 2 * 8 * 6 * 5 * 4 - stand_in
    # Of five inputs of this size: behind the projection; not the next; formed; not; formed.
    assert kept[NEVER] - kept[ALWAYS] == 3 * one


@pytest.mark.parametrize("memory", ["speed", "lean"])
def test_other_memory_modes_keep_what_they_kept(
    memory: str, of_any_size: pytest.MonkeyPatch
) -> None:
    """In "speed" nothing is computed again; in "lean" there is no raw output to form it of."""
    net, x, kept = row(), image(), []
    for least in (ALWAYS, NEVER):
        of_any_size.setattr(op, "LEAST_BYTES", least)
        with fastres.use_memory(memory):
            kept.append(saved_bytes(net, lambda: net(x)))
    assert kept[0] == kept[1]


def test_a_chain_of_convolutions_keeps_each_output_once(of_any_size: pytest.MonkeyPatch) -> None:
    """Without a shortcut an output is an activation of the raw one."""
    torch.manual_seed(0)
    net = nn.Sequential(*[fastres.nn.ConvBNReLU(6, 6, 3, padding=1) for _ in range(4)])
    x, found, kept = image(), [], []
    for least in (ALWAYS, NEVER):
        of_any_size.setattr(op, "LEAST_BYTES", least)
        kept.append(saved_bytes(net, lambda: net(x)))
        found.append(gradients(copy.deepcopy(net), x))
    assert kept[1] - kept[0] == 3 * (x.nbytes - 4)
    assert all([torch.equal(a, b) for a, b in zip(*found, strict=True)])


def test_what_was_pooled_is_kept(of_any_size: pytest.MonkeyPatch) -> None:
    """It is smaller than what it would be formed of."""
    torch.manual_seed(0)
    first = fastres.nn.ConvBNReLU(6, 8, 3, padding=1)
    stem = nn.Sequential(first.conv, first.bn, first.relu, nn.MaxPool2d(3, 2, 1))
    net, x, kept = nn.Sequential(stem, fastres.BasicBlock(8, 8)), image(), []
    fastres.convert(net)
    found = []
    for least in (ALWAYS, NEVER):
        of_any_size.setattr(op, "LEAST_BYTES", least)
        kept.append(saved_bytes(net, lambda: net(x)))
        found.append(gradients(copy.deepcopy(net), x))
    assert kept[0] == kept[1]
    assert all([torch.equal(a, b) for a, b in zip(*found, strict=True)])


def test_an_input_changed_in_place_is_kept() -> None:
    """What the block in front would form is not what this one was given."""
    first, second, x = projected(6, 8), fastres.BasicBlock(8, 8), image()
    middle = first(x)
    with torch.no_grad():
        middle.mul_(2)
    found = gradients(copy.deepcopy(second), middle)
    assert all(
        [
            torch.equal(a, b)
            for a, b in zip(found, gradients(second, middle.detach().requires_grad_()), strict=True)
        ]
    )


def test_hooks_on_saved_tensors_see_the_input() -> None:
    """They may move each tensor elsewhere: none is to be moved twice."""
    net, x = row(), image()
    seen: list[Tensor] = []  # held, so that no address stands for two

    def pack(t: Tensor) -> Tensor:
        seen.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hooked = gradients(net, x)
    assert all([torch.equal(a, b) for a, b in zip(hooked, gradients(row(), x), strict=True)])
    addresses = [t.data_ptr() for t in seen]
    assert len(addresses) == len(set(addresses)) > 12, "none is saved by two blocks"


def test_checkpointed_blocks_form_nothing_of_what_was_in_front() -> None:
    first, second, x = projected(6, 8), fastres.BasicBlock(8, 8), image()
    plain = torch.autograd.grad(second(first(x)).square().sum(), [x, *first.parameters()])
    out = checkpoint(second, first(x), use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), [x, *first.parameters()])
    assert all([torch.equal(a, b) for a, b in zip(plain, again, strict=True)])


def test_the_block_in_front_may_have_had_its_backward() -> None:
    """Its tensors are freed then, but this block holds on to those that it needs."""
    first, second, x = projected(6, 8), fastres.BasicBlock(8, 8), image()
    parameters = [*second.parameters()]
    whole = torch.autograd.grad(second(first(x)).square().sum(), parameters)
    middle = first(x)
    out = second(middle).square().sum()
    middle.sum().backward()
    late = torch.autograd.grad(out, parameters)
    assert all([torch.equal(a, b) for a, b in zip(whole, late, strict=True)])


def test_a_block_behind_one_that_was_freed_keeps_its_input() -> None:
    first, second, x = projected(6, 8), fastres.BasicBlock(8, 8), image()
    middle = first(x)
    middle.sum().backward()
    out = second(middle).square().sum()
    found = torch.autograd.grad(out, [*second.parameters()])
    wanted = torch.autograd.grad(second(first(x)).square().sum(), [*second.parameters()])
    assert all([torch.equal(a, b) for a, b in zip(found, wanted, strict=True)])


def test_gradients_of_gradients_reach_the_blocks_in_front(of_any_size: pytest.MonkeyPatch) -> None:
    """The stand-in of an input has its place in the graph."""
    found = []
    for least in (ALWAYS, NEVER):
        of_any_size.setattr(op, "LEAST_BYTES", least)
        net, x = row(torch.float64), image(torch.float64)
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *net.parameters()]))
    for again, kept in zip(*found, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-12, atol=1e-12 * float(kept.abs().max()))


def test_gradients_by_the_batch(of_any_size: pytest.MonkeyPatch) -> None:
    found = []
    for least in (ALWAYS, NEVER):
        of_any_size.setattr(op, "LEAST_BYTES", least)
        net, x = row(torch.float64), image(torch.float64)
        out = net(x)
        torch.manual_seed(2)
        incoming = torch.randn(3, *out.shape, dtype=out.dtype)
        found.append(torch.autograd.grad(out, x, incoming, is_grads_batched=True)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_nothing_outlives_a_backward() -> None:
    """Tensors are saved by autograd alone, which frees them, though the loss lives on."""
    loss = row()(image()).sum()
    nodes = [node for node in _nodes([loss]) if isinstance(node, op._Node)]
    assert sum([node.origin is not None for node in nodes]) == 3
    loss.backward()
    for node in nodes:
        assert node.origin is None or not node.origin.tensors
        with pytest.raises(RuntimeError, match="second time"):
            _ = node.saved_tensors
