"""Parameters that change between forward and backward: as much is allowed as torch's own allows.

A block saves what a wanted gradient reads, and no more: pipelines with delayed updates, running
averages of weights and clipping in front of a late backward change the rest meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import CLASSIC, KINDS, RANDOM, SPARSE, Kind, kind
from torch import Tensor, nn

import fastres

Run = Callable[[Tensor], Tensor]
Gradients = dict[str, Tensor]


def names(each: Kind) -> list[str]:
    """What may want a gradient, and may change."""
    return ["x", *[name for name, _ in each.pair()[0].named_parameters()]]


def gradients(
    module: nn.Module, run: Run, x: Tensor, wanting: set[str], changed: str | None
) -> Gradients | None:
    """The gradients where `changed` is another one when backward runs; None where that raises."""
    for name, p in module.named_parameters():
        p.requires_grad_(name in wanting)
    leaf = x.detach().clone().requires_grad_("x" in wanting)
    x = leaf * 1  # A leaf must not be changed in place.
    torch.manual_seed(5)
    out = run(x)
    if changed is not None:
        with torch.no_grad():
            (x if changed == "x" else module.get_parameter(changed)).add_(0.5)
    try:
        out.square().mean().backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None
    named = {"x": leaf, **dict(module.named_parameters())}
    return {name: t.grad for name, t in named.items() if t.grad is not None}


def check(
    each: Kind, wanting: set[str], changed: str, train: bool, wrap: Callable[[nn.Module], Run]
) -> None:
    """Where torch allows the change it is allowed, and where it is allowed it shows nowhere."""
    x = each.input(torch.float64, shape=(3, 5, 4))
    results = []
    for fused, change in ((False, None), (False, changed), (True, changed)):
        module = each.pair(torch.float64, training=train)[fused]
        results.append(gradients(module, wrap(module), x, wanting, change))
    truth, stock, found = results
    if found is None:
        assert stock is None, "torch allows this change"
        return
    assert truth is not None and found.keys() == truth.keys()
    for name, grad in truth.items():
        torch.testing.assert_close(found[name], grad, msg=lambda text, n=name: f"{n}: {text}")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_torch_lets_change_may_change(data: st.DataObject) -> None:
    each = data.draw(st.sampled_from([*CLASSIC, *KINDS, *SPARSE, *RANDOM]), label="block")
    own = names(each)
    wanting = data.draw(st.sets(st.sampled_from(own), min_size=1), label="wanting")
    memory = data.draw(st.sampled_from(["speed", "balanced", "lean"]), label="memory")
    # A pooled input, and a leading norm's output unless it is asked to be kept, are computed again.
    kept = (memory == "speed" or each in CLASSIC) and "pooled" not in each.name
    changed = data.draw(st.sampled_from(own if kept else own[1:]), label="changed")
    backend = data.draw(st.sampled_from(["auto", "aten", "reference"]), label="backend")
    with fastres.use_memory(memory), fastres.use_backend(backend):
        check(each, wanting, changed, data.draw(st.booleans(), label="train"), lambda m: m)


#: Which parameters want a gradient: all, biases, norms, all behind the first convolution.
WANTING: dict[str, Callable[[str], bool]] = {
    "all": lambda name: name != "x",
    "biases": lambda name: name.endswith("bias"),
    "norms": lambda name: name.startswith("bn"),
    "behind": lambda name: name not in ("x", "conv1.weight", "downsample.1.weight"),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("wanting", WANTING)
@pytest.mark.parametrize("name", ["basic", "bottleneck", "bottleneck-pooled"])
def test_each_parameter_of_a_block(name: str, wanting: str, train: bool) -> None:
    own = names(kind(name))
    for changed in own:
        check(kind(name), {*filter(WANTING[wanting], own)}, changed, train, lambda m: m)


@pytest.mark.parametrize("wanting", WANTING)
def test_each_parameter_of_a_compiled_block(wanting: str) -> None:
    """A compiled graph saves whatever enters it."""
    own = names(kind("basic"))
    for changed in own:
        torch._dynamo.reset()
        check(
            kind("basic"), {*filter(WANTING[wanting], own)}, changed, True,
            lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
        )  # fmt: skip
    torch._dynamo.reset()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_change_in_front_of_a_gradient_of_gradients(train: bool) -> None:
    """What a second backward reads and the first does not: it raises, rather than be wrong."""
    _, block = kind("bottleneck").pair(torch.float64, training=train)
    block.conv1.weight.requires_grad_(False)
    x = kind("bottleneck").input(torch.float64).detach()
    out = block(x).square().mean()
    with torch.no_grad():
        block.conv1.weight.mul_(2)
    weight = block.conv2.weight
    torch.autograd.grad(out, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, weight, create_graph=True)
