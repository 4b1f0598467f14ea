"""Any tensor of any block may be a view: addresses are passed on with strides, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import CLASSIC, KINDS, SPARSE, Kind
from module_parity import assert_same, randomise, step
from torch import Tensor, nn

import fastres
from fastres.testing.builder import column, expanded

View = Callable[[Tensor], Tensor]


def offset(t: Tensor) -> Tensor:
    """The same values behind three others, so that no vector load is aligned."""
    memory = torch.full((t.numel() + 3,), float("nan"), dtype=t.dtype)
    memory[3:] = t.flatten()
    return memory[3:].view(t.shape)


def stepped(t: Tensor) -> Tensor:
    """Each second value of a larger tensor."""
    memory = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    memory[..., ::2] = t
    return memory[..., ::2]


def swapped(t: Tensor) -> Tensor:
    """The same values with the first dimension innermost."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def repeated(t: Tensor) -> Tensor:
    """The values of the first output channel for all of them."""
    return t[:1].expand(t.shape)


VECTORS: dict[str, View] = {f.__name__: f for f in (column, expanded, offset, stepped)}
WEIGHTS: dict[str, View] = {f.__name__: f for f in (offset, stepped, swapped, repeated)}


def replace(module: nn.Module, path: str, view: View) -> None:
    """Make a view of a parameter or buffer."""
    owner, _, name = path.rpartition(".")
    child = module.get_submodule(owner)
    value = view(getattr(child, name).detach())
    if name in child._buffers:
        child._buffers[name] = value
    else:
        child._parameters[name] = nn.Parameter(value)


def chain() -> nn.Module:
    """What is traced rather than known."""
    parts = [nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False),
             nn.BatchNorm2d(4)]  # fmt: skip
    return nn.Sequential(*parts)


def pair(each: Kind | None, train: bool) -> tuple[nn.Module, nn.Module]:
    """(stock, fused) of a kind, or of a chain."""
    if each is not None:
        return each.pair(torch.float64, training=train)
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(randomise(chain()).double().train(train))
    assert fastres.convert(made[1]).fused == 1
    return made[0], made[1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_view_is_read_as_torch_reads_it(data: st.DataObject) -> None:
    each = data.draw(st.sampled_from([*CLASSIC, *KINDS, *SPARSE, None]), label="block")
    train = data.draw(st.booleans(), label="train")
    stock, fused = pair(each, train)
    tensors = dict([*stock.named_parameters(), *stock.named_buffers()])
    views = {}
    paths = [name for name, t in tensors.items() if t.dim() in (1, 4)]
    for path in data.draw(st.sets(st.sampled_from(paths), min_size=1), label="views"):
        choices = set(VECTORS if tensors[path].dim() == 1 else WEIGHTS)
        if train and "running" in path:  # One place for all channels is torch's own affair.
            choices.discard("expanded")
        views[path] = data.draw(st.sampled_from(sorted(choices)), label=path)
    for path, name in views.items():
        view = (VECTORS | WEIGHTS)[name]
        replace(fused, path, view)
        # torch itself reads some of them wrongly in channels_last: it gets the values alone.
        replace(stock, path, lambda t, view=view: view(t).contiguous())
    backend = data.draw(st.sampled_from(["auto", "aten", "reference"]), label="backend")
    memory = data.draw(st.sampled_from(["speed", "balanced", "lean"]), label="memory")
    x = (CLASSIC[0] if each is None else each).input(torch.float64, shape=(3, 5, 4))
    with fastres.use_backend(backend), fastres.use_memory(memory):
        found = step(fused, x)
        again = step(fused, x, backward=False)
    assert_same(found, step(stock, x))
    assert_same(again, step(stock, x, backward=False))
