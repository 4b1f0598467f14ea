"""Children of a block as the fused path sees them: a block with its layers, or why not.

Everything is read when a block is called, never when it is built: children get replaced, frozen
and hooked during a model's life. What was read is kept, and read again where anything it came from
has changed. Nothing here runs a kernel or changes a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils import _python_dispatch

from fastres.block import Block, Layer, Norm, PoolSpec, Unit, pair
from fastres.block.check import why_not_watched
from fastres.block.layers import is_size
from fastres.kernels import Conv, MaxPool
from fastres.nn import factors
from fastres.nn.frozen import TENSORS, frozen_children, frozen_of, has_tensors
from fastres.nn.genuine import (
    GELU,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Hardswish,
    Identity,
    LeakyReLU,
    MaxPool2d,
    ReLU,
    ReLU6,
    Sequential,
    SiLU,
    replaced,
)


class Decline(NamedTuple):
    """Why a block runs its stock path.

    Attributes:
        module: the child at fault, or None where it is the block as a whole.
        text: what is the matter with it, to follow its name.
        permanent: False for what comes and goes, such as hooks; conversion only minds the rest.
    """

    module: nn.Module | None
    text: str
    permanent: bool = True


class Steps(NamedTuple):
    """The children that make up one unit, in the order of the data; nn.Identity is none.

    `drop` multiplies what the others give by random numbers: dropout or stochastic depth, see
    `fastres.nn.factors`.
    """

    conv: nn.Module | None = None
    norm: nn.Module | None = None
    act: nn.Module | None = None
    drop: nn.Module | None = None


class Projection(NamedTuple):
    """A shortcut taken apart: [average pooling,] convolution, batch norm if there is one."""

    conv: nn.Module | None
    norm: nn.Module | None
    pool: nn.AvgPool2d | None = None


class Parts(NamedTuple):
    """What a block is made of, in the order of its computation.

    Attributes:
        units: of the main path. Where there is no shortcut, `end` is the last one's activation.
        end: the activation after the addition, or None.
        shortcut: where it starts, one of `fastres.block.SHORTCUTS`.
        projection: a module on the shortcut (see `projection_of`), a projection taken apart, or
            None.
        identities: parts that must compute nothing: nn.Identity, or None.
        wrappers: modules around the children whose own hooks count too.
        gate: what scales the main path by a factor of its own mean, before the last unit's `drop`;
            see `fastres.nn.factors`.
        max_pool: max pooling behind `end`, where there is no shortcut; nn.Identity is none.
        watched: modules that the parts depend on without being among them.
    """

    units: tuple[Steps, ...]
    end: nn.Module | None = None
    shortcut: str = "input"
    projection: nn.Module | Projection | None = None
    identities: tuple[nn.Module | None, ...] = ()
    wrappers: tuple[nn.Module | None, ...] = ()
    gate: nn.Module | None = None
    max_pool: nn.Module | None = None
    watched: tuple[nn.Module, ...] = ()


class Match(NamedTuple):
    """A block in the terms of `fastres.block`.

    `drops` are the modules that draw a factor, by the index of their unit: where there are any, the
    layers are complete only with these factors. `gate` gives a factor for the last unit too, and
    that unit `scale`s on its behalf.
    """

    block: Block
    layers: tuple[Layer, ...]
    drops: tuple[tuple[int, nn.Module], ...] = ()
    gate: nn.Module | None = None


#: Types of tensor that hold plain values; DTensor and quantised weights are not among them.
_PLAIN = (nn.Parameter, Tensor)


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """The children by name, without those that are None: who looks for one finds none, and a block
    that would call it raises what torch raises.
    """
    return {name: child for name, child in module._modules.items() if child is not None}


def hooked(module: nn.Module) -> Decline | None:
    """Whether calling `module` would do more than its class's forward."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return Decline(module, "carries hooks", permanent=False)
    if "forward" in module.__dict__:
        return Decline(module, "has its forward replaced", permanent=False)
    return None


def why_not_now() -> str | None:
    """What keeps every block from being fused at the moment, whatever its children."""
    if _module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "global module hooks are registered"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's own operators"
    if _exporting():
        return "torch.export records torch's own operators"
    if _python_dispatch._is_in_non_infra_torch_dispatch_mode:
        return why_not_watched() or replaced()
    return replaced()


def _exporting() -> bool:
    """torch.compiler.is_exporting, which under torch.compile always says True before torch 2.13."""
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def match(parts: Parts | Decline, alone: bool = False) -> Match | Decline:
    """What a block computes, read off its children as they are now.

    Args:
        parts: of the block.
        alone: whether norms and activations without a convolution are a block too.
    """
    if isinstance(parts, Decline):
        return parts
    decline = first_hooked(parts.wrappers) or _why_not_identities(parts.identities)
    if decline is not None:
        return decline
    units = _units_of(parts.units)
    end, gate, max_pool = activation_of(parts.end), gate_of(parts), max_pool_of(parts.max_pool)
    for part in (units, end, gate, max_pool):
        if isinstance(part, Decline):
            return part
    assert isinstance(units, _Units) and isinstance(end, str) and not isinstance(gate, Decline)
    assert not isinstance(max_pool, Decline)
    if not alone and not any([layer.unit.conv is not None for layer in units.layers]):
        return Decline(None, "nothing in it is a convolution")
    shortcut = parts.shortcut
    if shortcut == "activated" and not units.leads:
        shortcut = "input"
    layers = units.layers
    if gate is not None:
        if layers[-1].unit.act != "none":
            return Decline(gate, "stands behind an activation")
        layers = (*layers[:-1], layers[-1]._replace(unit=layers[-1].unit._replace(scale=True)))
    elif shortcut == "none" and end == "none" and layers and not layers[-1].unit.scale:
        # A norm with an activation within: it is the block's.
        *inner, last = layers
        end, layers = last.unit.act, (*inner, last._replace(unit=last.unit._replace(act="none")))
    block = Block(tuple([layer.unit for layer in layers]), shortcut, act=end, max_pool=max_pool)
    matched = Match(block, layers, units.drops, gate)
    return matched if parts.projection is None else _with_projection(matched, parts.projection)


def convolution_of(
    owner: nn.Module, stride: Any, padding: Any, dilation: Any, groups: int
) -> nn.Module:
    """A Conv2d that computes with the weight and bias that a module has now and later."""
    conv = Conv2d(1, 1, 1, device="meta")
    conv._parameters = owner._parameters
    conv.stride, conv.padding, conv.dilation, conv.groups = stride, padding, dilation, groups
    return conv


class _Units(NamedTuple):
    """The units of a main path that do anything; `leads`: whether the first is one of them."""

    layers: tuple[Layer, ...]
    drops: tuple[tuple[int, nn.Module], ...]
    leads: bool


def _units_of(units: Sequence[Steps]) -> _Units | Decline:
    layers: list[Layer] = []
    drops: list[tuple[int, nn.Module]] = []
    leads = False
    for i, steps in enumerate(units):
        layer = layer_of(steps)
        if isinstance(layer, Decline):
            return layer
        if layer.unit == _EMPTY:
            continue
        if not layers and (changing := _changes_input(layer, steps)) is not None:
            return changing
        if layer.unit.scale and steps.drop is not None:
            drops.append((len(layers), steps.drop))
        layers.append(layer)
        leads = leads or i == 0
    return _Units(tuple(layers), tuple(drops), leads)


def _changes_input(layer: Layer, steps: Steps) -> Decline | None:
    """Whether the first thing that happens to the block's input happens in place."""
    if layer.unit.conv is not None or layer.unit.norm is not None:
        return None
    first = steps.drop if layer.unit.act == "none" else steps.act
    in_place = getattr(first, "inplace", False)
    return Decline(first, "changes the block's input in place") if in_place else None


#: A unit all of whose steps are nn.Identity.
_EMPTY = Unit()


def gate_of(parts: Parts) -> nn.Module | Decline | None:
    """The gate of a block's main path, if that is a module that computes something."""
    gate = parts.gate
    if gate is None or type(gate) is Identity:
        return None if gate is None else hooked(gate)
    if (known := factors.gate_of(gate)) is None:
        return Decline(gate, f"is a {type(gate).__name__}, which is not fused")
    if parts.shortcut == "activated":
        return Decline(gate, "stands in a block whose shortcut is its first activation")
    if (decline := hooked(gate)) is not None:
        return decline
    return gate if (reason := known.why_not(gate)) is None else Decline(gate, reason)


def _with_projection(matched: Match, shortcut: nn.Module | Projection) -> Match | Decline:
    projection = projection_of(shortcut)
    if projection is None or isinstance(projection, Decline):
        return matched if projection is None else projection
    layer = layer_of(Steps(projection.conv, projection.norm))
    if isinstance(layer, Decline):
        return layer
    if layer.unit.conv is None:
        return Decline(projection.norm, "stands alone on the shortcut")
    if layer.unit.act != "none":
        return Decline(projection.norm, "applies an activation on the shortcut")
    pool = pool_of(projection.pool)
    if isinstance(pool, Decline):
        return pool
    block = matched.block._replace(projection=layer.unit, pool=pool)
    return matched._replace(block=block, layers=(*matched.layers, layer))


def layer_of(steps: Steps) -> Layer | Decline:
    """A unit's children with their tensors."""
    conv, norm, act, drop = steps
    for module in (conv, norm):
        if type(module) is Identity and (watched := hooked(module)) is not None:
            return watched
    conv = None if type(conv) is Identity else conv
    norm = None if type(norm) is Identity else norm
    name, scale = _activation_behind(norm, act), drops(drop)
    if isinstance(name, Decline):
        return name
    if isinstance(scale, Decline):
        return scale
    decline = (conv is not None and why_not_conv(conv)) or (norm is not None and why_not_norm(norm))
    if decline:
        return decline
    spec = weight = bias = None
    if conv is not None:
        spec = Conv(pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups)  # type: ignore[arg-type]
        weight, bias = tensor_of(conv, "weight"), tensor_of(conv, "bias")
    if norm is None:
        return Layer(Unit(spec, None, name, scale), weight, bias)
    return _with_norm(norm, spec, name, scale)._replace(weight=weight, bias=bias)  # type: ignore[arg-type]


#: Classes that are nn.BatchNorm2d and call more modules behind it: which ones, the activation last,
#: and the others must be nn.Identity.
_NORM_ACTS: dict[type, Callable[[Any], tuple[nn.Module | None, ...]]] = {}


def register_norm_act(cls: type, behind: Callable[[Any], tuple[nn.Module | None, ...]]) -> None:
    """Announce a subclass of nn.BatchNorm2d that has an activation within.

    Args:
        cls: its parameters, buffers and modes must be nn.BatchNorm2d's.
        behind: the modules that it calls behind the batch norm, in their order. The last is the
            activation; a block is fused where the others are nn.Identity.
    """
    _NORM_ACTS[cls] = behind


def has_activation(module: nn.Module) -> bool:
    """Whether a module is a norm of a class that calls more modules behind it."""
    frozen = frozen_of(module)
    return type(module) in _NORM_ACTS if frozen is None else bool(frozen.behind)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is of a class that is known for a batch norm over images."""
    cls = type(module)
    return cls is BatchNorm2d or cls in _NORM_ACTS or frozen_of(module) is not None


def called_behind(norm: nn.Module | None) -> Sequence[nn.Module | None]:
    """The modules that a norm calls behind its arithmetic; the last is an activation."""
    if (frozen := frozen_of(norm)) is not None and norm is not None:
        return frozen_children(norm, frozen)
    announced = _NORM_ACTS.get(type(norm))
    return () if announced is None else announced(norm)


def _activation_behind(norm: nn.Module | None, act: nn.Module | None) -> str | Decline:
    """What a norm's own activation and the one behind it make together."""
    outer = activation_of(act)
    behind = called_behind(norm)
    if not behind or isinstance(outer, Decline):
        return outer
    *rest, last = behind
    inner = _why_not_identities(rest) or activation_of(last)
    if isinstance(inner, Decline) or outer == "none":
        return inner
    # A second ReLU changes nothing.
    same = inner == "none" or inner == outer == "relu"
    return outer if same else Decline(act, "is a second activation")


def _with_norm(norm: Any, conv: Conv | None, act: str, scale: bool) -> Layer:
    if (frozen := frozen_of(norm)) is not None:
        eps = norm.eps if frozen.eps is None else frozen.eps
        weight, bias, mean, var = [tensor_of(norm, name) for name in TENSORS]
        unit = Unit(conv, Norm(eps, "running"), act, scale)
        promotes = frozen.promotes
        return Layer(unit, None, None, weight, bias, mean, var, momentum=0.0, promotes=promotes)
    running_mean, running_var, momentum, counter = running_of(norm)
    known = running_mean is not None and running_var is not None
    source = "running" if known and not norm.training else "batch"
    return Layer(
        Unit(conv, Norm(norm.eps, source), act, scale), None, None,
        tensor_of(norm, "weight"), tensor_of(norm, "bias"), running_mean, running_var, None,
        norm.training, momentum, counter,
    )  # fmt: skip


def activation_of(act: nn.Module | None) -> str | Decline:
    """The name of an activation, "none" for none; torch's own modules are known."""
    if act is None:
        return "none"
    name = _name_of(act)
    if name is not None:
        return hooked(act) or name
    return Decline(act, f"is a {type(act).__name__}, not an activation of a kernel")


#: The slope that kernels know.
_SLOPE = 0.01


def _name_of(act: Any) -> str | None:
    name = ACTIVATIONS.get(type(act))
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    if name == "leaky_relu" and act.negative_slope != _SLOPE:
        return None
    if name == "relu6" and (act.min_val, act.max_val) != (0.0, 6.0):
        return None
    return name


def drops(module: nn.Module | None) -> bool | Decline:
    """Whether a unit's `drop` multiplies by a factor now; in evaluation it does nothing."""
    if module is None or type(module) is Identity:
        return False if module is None else hooked(module) or False
    if (known := factors.drop_of(module)) is None:
        return Decline(module, f"is a {type(module).__name__}, which is not fused")
    return hooked(module) or known.works(module)


#: torch's modules by the activation that they compute, where their settings are the usual ones.
ACTIVATIONS: dict[type, str] = {
    ReLU: "relu", Identity: "none", SiLU: "silu", GELU: "gelu", LeakyReLU: "leaky_relu",
    ReLU6: "relu6", Hardswish: "hardswish",
}  # fmt: skip


def why_not_conv(conv: nn.Module | None) -> Decline | None:
    """Why a convolution cannot be fused, or None."""
    if type(conv) is not Conv2d:
        return Decline(conv, f"is a {type(conv).__name__}, not a Conv2d")
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return Decline(conv, "pads otherwise than with a number of zeros")
    if "_conv_forward" in conv.__dict__:
        return Decline(conv, "has its _conv_forward replaced", permanent=False)
    return hooked(conv) or odd_tensor(conv, conv._parameters)


def why_not_norm(norm: nn.Module | None) -> Decline | None:
    """Why a batch norm cannot be fused, or None."""
    if norm is None or not is_norm(norm):
        return Decline(norm, f"is a {type(norm).__name__}, not a BatchNorm2d")
    if frozen_of(norm) is not None:
        return hooked(norm) or _why_not_frozen(norm)
    if "_check_input_dim" in norm.__dict__:
        return Decline(norm, "has its _check_input_dim replaced", permanent=False)
    assert isinstance(norm, nn.BatchNorm2d)
    return hooked(norm) or why_not_state(norm)


def _why_not_frozen(norm: nn.Module) -> Decline | None:
    """Why the tensors of a frozen norm cannot be fused, or None."""
    frozen = frozen_of(norm)
    hidden = any([name in norm.__dict__ for name in TENSORS])
    if hidden or not has_tensors(norm) or frozen is None:
        return Decline(norm, f"has not all of {', '.join(TENSORS)} as it had")
    if None in frozen_children(norm, frozen) or (frozen.eps is None and "eps" not in norm.__dict__):
        return Decline(norm, "has lost an attribute that its forward reads")
    return odd_tensor(norm, norm._parameters) or odd_tensor(norm, norm._buffers)


def why_not_state(norm: nn.BatchNorm2d) -> Decline | None:
    """Why the settings and tensors of a batch norm cannot be fused, or None."""
    if norm.momentum is not None and type(norm.momentum) not in (float, int):
        return Decline(norm, f"has a {type(norm.momentum).__name__} for momentum")
    if (tensor_of(norm, "running_mean") is None) is not (tensor_of(norm, "running_var") is None):
        return Decline(norm, "has only one of its running statistics")
    return odd_tensor(norm, norm._parameters) or odd_tensor(norm, norm._buffers)


def odd_tensor(module: nn.Module, table: dict[str, Any]) -> Decline | None:
    """Whether a parameter or buffer is more than a plain tensor: a DTensor, a quantised weight."""
    for tensor in table.values():
        if tensor is not None and type(tensor) not in _PLAIN:
            return Decline(module, f"holds a {type(tensor).__name__}, not a plain tensor")
    return None


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer, without the detour that torch's attribute lookup takes."""
    for table in (module._parameters, module._buffers):
        if name in table:
            return table[name]
    tensor: Tensor | None = getattr(module, name)
    return tensor


def running_of(
    norm: nn.BatchNorm2d,
) -> tuple[Tensor | None, Tensor | None, float | None, Tensor | None]:
    """(running_mean, running_var, momentum, counter), as nn.BatchNorm2d.forward uses them."""
    if not norm.training:
        return tensor_of(norm, "running_mean"), tensor_of(norm, "running_var"), 0.0, None
    if not norm.track_running_stats:
        return None, None, 0.0, None
    return (
        tensor_of(norm, "running_mean"),
        tensor_of(norm, "running_var"),
        norm.momentum,
        tensor_of(norm, "num_batches_tracked"),
    )


def projection_of(shortcut: nn.Module | Projection) -> Projection | Decline | None:
    """A shortcut taken apart: Conv2d and BatchNorm2d in a Sequential, perhaps behind pooling.

    Returns:
        None for an identity.
    """
    if isinstance(shortcut, Projection):
        return shortcut
    if not isinstance(shortcut, nn.Module):
        return Decline(None, f"has a {type(shortcut).__name__} for a shortcut, not a module")
    if (decline := hooked(shortcut)) is not None:
        return decline
    if type(shortcut) is Identity:
        return None
    if type(shortcut) is Conv2d:
        return Projection(shortcut, None)
    if type(shortcut) is Sequential:
        return _projection_in(shortcut) or Decline(shortcut, _NO_PROJECTION)
    return Decline(shortcut, _NO_PROJECTION)


_NO_PROJECTION = "is not a Conv2d with a BatchNorm2d, or these behind an AvgPool2d"


def _projection_in(shortcut: nn.Sequential) -> Projection | Decline | None:
    parts = [*children_of(shortcut).values()]
    if len(parts) < len(shortcut._modules):
        return None
    computing = [m for m in parts if type(m) is not Identity]
    if (decline := first_hooked(m for m in parts if type(m) is Identity)) is not None:
        return decline
    pool: Any = None
    if computing and type(computing[0]) is AvgPool2d:
        pool, *computing = computing
        if (decline := hooked(pool)) is not None:
            return decline
    if len(computing) == 2:
        return Projection(computing[0], computing[1], pool)
    if len(computing) == 1:
        return Projection(computing[0], None, pool)
    return None


def pool_of(pool: nn.AvgPool2d | None) -> PoolSpec | Decline | None:
    """The pooling in front of a projection."""
    if pool is None:
        return None
    if pool.divisor_override is not None:
        return Decline(pool, "overrides the divisor")
    kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
    if not (is_size(kernel) and is_size(stride) and is_size(padding)):
        return Decline(pool, "has other settings than ints or pairs of them")
    return PoolSpec(
        pair(kernel), pair(stride), pair(padding), pool.ceil_mode, pool.count_include_pad
    )


def max_pool_of(pool: nn.Module | None) -> MaxPool | Decline | None:
    """The max pooling behind a chain; nn.Identity is none."""
    if pool is None:
        return None
    if type(pool) is Identity:
        return hooked(pool)
    if type(pool) is not MaxPool2d:
        return Decline(pool, f"is a {type(pool).__name__}, not a MaxPool2d")
    if pool.return_indices is not False or type(pool.ceil_mode) is not bool:
        return Decline(pool, "returns indices, or has another ceil_mode than a bool")
    kernel, stride, padding, dilation = pool.kernel_size, pool.stride, pool.padding, pool.dilation
    if not all([is_size(size) for size in (kernel, stride, padding, dilation)]):
        return Decline(pool, "has other settings than ints or pairs of them")
    sizes = pair(kernel), pair(stride), pair(padding), pair(dilation)
    return hooked(pool) or MaxPool(*sizes, pool.ceil_mode)


def first_hooked(modules: Iterable[nn.Module | None]) -> Decline | None:
    """The first of `modules` that does more than its class's forward."""
    for module in modules:
        if module is not None and (decline := hooked(module)) is not None:
            return decline
    return None


def _why_not_identities(modules: Sequence[nn.Module | None]) -> Decline | None:
    for module in modules:
        if module is None:
            continue
        if type(module) is not Identity:
            return Decline(module, f"is a {type(module).__name__}, which is not fused")
        if (decline := hooked(module)) is not None:
            return decline
    return None
