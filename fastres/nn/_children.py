"""Children of a block as the fused path sees them: known and free of hooks, or why not.

Everything is read when a block is called, never when it is built: children get replaced, frozen
and hooked during a model's life. Nothing here runs a kernel or changes a buffer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from fastres.block import PoolSpec
from fastres.block.layers import ConvNorm, is_size, pair
from fastres.nn._genuine import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Identity,
    ReLU,
    Sequential,
    replaced,
)


class Decline(NamedTuple):
    """Why a block runs its stock path.

    Attributes:
        module: the child at fault, or None where it is the block as a whole.
        text: what is the matter with it, to follow its name.
        lasting: False for what comes and goes, such as hooks; conversion only minds the rest.
    """

    module: nn.Module | None
    text: str
    lasting: bool = True


#: Convolution, batch norm, and activation or None.
Unit = tuple[nn.Module | None, nn.Module | None, nn.Module | None]


class Projection(NamedTuple):
    """A shortcut taken apart: [average pooling,] convolution, batch norm."""

    conv: nn.Module | None
    norm: nn.Module | None
    pool: nn.AvgPool2d | None = None


class Parts(NamedTuple):
    """What a block is made of, in the order of its computation.

    Attributes:
        units: (convolution, batch norm, activation or None) of the main path.
        end: the activation after the addition, or None.
        shortcut: None for the identity, else a module (see `projection_of`) or a projection.
        passive: parts that must compute nothing: identities, or None.
        containers: modules around the children whose own hooks count too.
        kind: "identity", or "none" for a chain without a shortcut.
    """

    units: tuple[Unit, ...]
    end: nn.Module | None
    shortcut: nn.Module | Projection | None = None
    passive: tuple[nn.Module | None, ...] = ()
    containers: tuple[nn.Module | None, ...] = ()
    kind: str = "identity"


#: Types of tensor that hold plain values; DTensor and quantised weights are not among them.
_PLAIN = (nn.Parameter, Tensor)


def hooked(module: nn.Module) -> Decline | None:
    """Whether calling `module` would do more than its class's forward."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return Decline(module, "carries hooks", lasting=False)
    if "forward" in module.__dict__:
        return Decline(module, "has its forward replaced", lasting=False)
    return None


def why_not_now() -> str | None:
    """What keeps every block from being fused at the moment, whatever its children."""
    if _module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "global module hooks are registered"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's own operators"
    if _exporting():
        return "torch.export records torch's own operators"
    return replaced()


def _exporting() -> bool:
    """torch.compiler.is_exporting, which under torch.compile always says True before torch 2.13."""
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def activation_of(act: nn.Module | None) -> str | Decline:
    """ "relu" or "none"; only torch's own ReLU and Identity are known."""
    if act is None:
        return "none"
    if type(act) is ReLU:
        return hooked(act) or "relu"
    if type(act) is Identity:
        return hooked(act) or "none"
    return Decline(act, f"is a {type(act).__name__}, not a ReLU")


def conv_norm(
    conv: nn.Module | None, norm: nn.Module | None, act: nn.Module | None
) -> ConvNorm | Decline:
    """A convolution, its batch norm and activation as the functional API takes them."""
    act_name = activation_of(act)
    if isinstance(act_name, Decline):
        return act_name
    decline = why_not_conv(conv) or why_not_norm(norm)
    if decline is not None:
        return decline
    assert isinstance(conv, Conv2d) and isinstance(norm, BatchNorm2d)
    weight, bias = parameter(conv, "weight"), parameter(conv, "bias")
    running_mean, running_var, momentum, counter = running_of(norm)
    return ConvNorm(
        weight, running_mean, running_var, parameter(norm, "weight"), parameter(norm, "bias"),
        bias, conv.stride, conv.padding, conv.dilation, conv.groups,  # type: ignore[arg-type]
        norm.training, momentum, norm.eps, act_name, counter,
    )  # fmt: skip


def norm_only(norm: nn.BatchNorm2d, act: str) -> ConvNorm:
    """A batch norm without a convolution as the functional API takes it."""
    running_mean, running_var, momentum, counter = running_of(norm)
    return ConvNorm(
        None, running_mean, running_var, parameter(norm, "weight"), parameter(norm, "bias"),
        training=norm.training, momentum=momentum, eps=norm.eps, act=act, counter=counter,
    )  # fmt: skip


def why_not_conv(conv: nn.Module | None) -> Decline | None:
    """Why a convolution cannot be fused, or None."""
    if type(conv) is not Conv2d:
        return Decline(conv, f"is a {type(conv).__name__}, not a Conv2d")
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return Decline(conv, "pads otherwise than with a number of zeros")
    if "_conv_forward" in conv.__dict__:
        return Decline(conv, "has its _conv_forward replaced", lasting=False)
    return hooked(conv) or odd_tensor(conv, conv._parameters)


def why_not_norm(norm: nn.Module | None) -> Decline | None:
    """Why a batch norm cannot be fused, or None."""
    if type(norm) is not BatchNorm2d:
        return Decline(norm, f"is a {type(norm).__name__}, not a BatchNorm2d")
    if "_check_input_dim" in norm.__dict__:
        return Decline(norm, "has its _check_input_dim replaced", lasting=False)
    return hooked(norm) or why_not_state(norm)


def why_not_state(norm: nn.BatchNorm2d) -> Decline | None:
    """Why the settings and tensors of a batch norm cannot be fused, or None."""
    if norm.momentum is not None and type(norm.momentum) not in (float, int):
        return Decline(norm, f"has a {type(norm.momentum).__name__} for momentum")
    if (buffer(norm, "running_mean") is None) is not (buffer(norm, "running_var") is None):
        return Decline(norm, "has only one of its running statistics")
    return odd_tensor(norm, norm._parameters) or odd_tensor(norm, norm._buffers)


def odd_tensor(module: nn.Module, table: dict[str, Any]) -> Decline | None:
    """Whether a parameter or buffer is more than a plain tensor: a DTensor, a quantised weight."""
    for tensor in table.values():
        if tensor is not None and type(tensor) not in _PLAIN:
            return Decline(module, f"holds a {type(tensor).__name__}, not a plain tensor")
    return None


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """module.<name>, without the detour that torch's attribute lookup takes."""
    own = module._parameters
    found: Tensor | None = own[name] if name in own else getattr(module, name)
    return found


def buffer(module: nn.Module, name: str) -> Tensor | None:
    """module.<name> for a buffer; as `parameter`."""
    own = module._buffers
    found: Tensor | None = own[name] if name in own else getattr(module, name)
    return found


def running_of(
    norm: nn.BatchNorm2d,
) -> tuple[Tensor | None, Tensor | None, float | None, Tensor | None]:
    """(running_mean, running_var, momentum, counter), as nn.BatchNorm2d.forward uses them."""
    if not norm.training:
        return buffer(norm, "running_mean"), buffer(norm, "running_var"), 0.0, None
    if not norm.track_running_stats:
        return None, None, 0.0, None
    return (
        buffer(norm, "running_mean"),
        buffer(norm, "running_var"),
        norm.momentum,
        buffer(norm, "num_batches_tracked"),
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
    if type(shortcut) is Sequential:
        parts = tuple(shortcut._modules.values())
        if len(parts) == 2:
            return Projection(parts[0], parts[1])
        if len(parts) == 3 and type(parts[0]) is Identity:
            return hooked(parts[0]) or Projection(parts[1], parts[2])
        if len(parts) == 3 and type(parts[0]) is AvgPool2d:
            return hooked(parts[0]) or Projection(parts[1], parts[2], parts[0])
    return Decline(shortcut, "is not a Conv2d with a BatchNorm2d, or these behind an AvgPool2d")


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


def first_hooked(modules: Iterable[nn.Module | None]) -> Decline | None:
    """The first of `modules` that does more than its class's forward."""
    for module in modules:
        if module is not None and (decline := hooked(module)) is not None:
            return decline
    return None
