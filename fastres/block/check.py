"""Whether a call can be fused, and why not: the one predicate of the functional layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from fastres.block.layers import Layer, is_size
from fastres.block.spec import Block, Unit
from fastres.block.tensors import pooled_shape
from fastres.kernels import activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Shape = tuple[int, ...]


def why_not_tensor(x: object) -> str | None:
    """Why a value cannot enter a fused block at all, or None."""
    if not isinstance(x, Tensor):
        return f"x must be a Tensor, got {type(x).__name__}"
    if x.dim() != 4:
        return f"x must have shape [N, C, H, W], got {list(x.shape)}"
    if x.dtype not in DTYPES:
        return f"x must be float32, bfloat16, float16 or float64, got {x.dtype}"
    if x.layout != torch.strided or x.is_quantized:
        return "x must be a dense tensor"
    if torch.overrides.has_torch_function_unary(
        x
    ) or torch.utils._python_dispatch.is_traceable_wrapper_subclass(x):
        return f"{type(x).__name__} is a tensor subclass with behaviour of its own"
    if _in_transform():
        return "torch.func transforms need torch's own operators"
    if (reason := why_not_watched()) is not None:
        return reason
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation needs torch's own operators"
    return "x is empty" if x.numel() == 0 else None


def why_not_watched() -> str | None:
    """Whether somebody's dispatch mode watches or rewrites torch's own operators, or None.

    What torch itself traces with takes ours; so does a mode with `sees_fused_blocks = True`. A mode
    may leave its flag behind, but nothing is compiled under one.
    """
    watched = _python_dispatch._is_in_non_infra_torch_dispatch_mode
    if not watched or torch.compiler.is_compiling():
        return None
    for mode in _python_dispatch._get_current_dispatch_mode_stack():
        if not (mode.is_infra_mode() or getattr(mode, "sees_fused_blocks", False)):
            return f"{type(mode).__name__}, a dispatch mode, is to see torch's own operators"
    return None


def _in_transform() -> bool:
    """Whether a transform of torch.func is at work, whose rules our operators do not have."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# What torch.compiler.assume_constant_result does, without importing the compiler: torch.compile
# calls the function as it traces, inside the very transforms that it traces, and keeps the answer.
# Traced itself, the function would always answer yes.
_in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_block(
    x: Tensor, block: Block, layers: Sequence[Layer], residual: Tensor | None = None
) -> str | None:
    """Why a block cannot be fused for these inputs, or None. Wrong inputs are among the reasons."""
    if (reason := why_not_tensor(x)) is not None:
        return reason
    main = len(block.units)
    shape = source = tuple(x.shape)
    for i, layer in enumerate(layers[:main]):
        reason, shape = _follow(shape, x, layer)
        if reason is not None:
            return reason
        if i == 0 and block.shortcut == "activated":
            source = shape
    if block.max_pool is not None and (reason := _why_not_pooled(block, shape)) is not None:
        return reason
    if block.keeps_mask and activation(block.act).gate is None:
        return f"activation {block.act!r} behind a shortcut cannot be recomputed from one branch"
    if block.projection is not None:
        reason, side = _follow(pooled_shape(block, source), x, layers[main])
        if reason is not None or side != shape:
            return reason or f"the shortcut has shape {list(side)}, the main path {list(shape)}"
    elif block.shortcut == "tensor":
        if not isinstance(residual, Tensor) or tuple(residual.shape) != shape:
            return f"the residual must have shape {list(shape)}"
        if residual.dtype != x.dtype or residual.device != x.device:
            return f"the residual must be {x.dtype} on {x.device}"
    elif block.shortcut != "none" and source != shape:
        return f"the residual must have shape {list(shape)}"
    return None


def _why_not_pooled(block: Block, shape: Shape) -> str | None:
    """Why a block cannot end with its max pooling; `shape` is what is pooled."""
    assert block.max_pool is not None
    norm = block.units[-1].norm
    if block.shortcut != "none" or not block.simple_end or block.open_end:
        return "max pooling must stand behind the norm and activation of a chain"
    if norm is not None and norm.source == "given":
        return "max pooling must stand behind a norm of its own block"
    return block.max_pool.why_not(shape[2:])


def _follow(shape: Shape, x: Tensor, layer: Layer) -> tuple[str | None, Shape]:
    """Why a layer cannot take an input of `shape`, and the shape it would give."""
    if (reason := why_not_settings(layer.unit)) is not None:
        return reason, shape
    conv = layer.unit.conv
    if layer.weight is not None and conv is not None:
        k, c, kh, kw = layer.weight.shape
        if c * conv.groups != shape[1] or k % conv.groups:
            return f"weight has {c} input channels per group, x has {shape[1]} channels", shape
        if layer.weight.dtype != x.dtype or layer.weight.device != x.device:
            return f"weight must be {x.dtype} on {x.device}", shape
        if layer.bias is not None and layer.bias.dtype != x.dtype:
            return f"bias must be {x.dtype}", shape
        h, w = conv.output_size(shape[2:], (kh, kw))
        shape = (shape[0], k, h, w)
    if min(shape) < 1:
        return f"a layer's output would have shape {list(shape)}", shape
    if layer.unit.batch_stats and shape[0] * shape[2] * shape[3] == 1:
        return "one value per channel has no variance", shape
    return _why_not_norm(layer, shape[1], x) or _why_not_factor(layer, shape, x), shape


def why_not_settings(unit: Unit) -> str | None:
    """Why the numbers of a unit need torch's own operators, or None.

    torch takes numpy's scalars, tensors and tuples of one as well, and raises for some of them.
    """
    norm, conv = unit.norm, unit.conv
    eps = 1.0 if norm is None or norm.source == "given" else norm.eps
    running = norm is not None and norm.source == "running"
    if type(eps) not in (float, int) or not (eps > 0 or (running and eps == 0)):
        return f"eps must be a positive float, got {eps!r}"
    if conv is None:
        return None
    if not (is_size(conv.stride) and is_size(conv.padding) and is_size(conv.dilation)):
        return "stride, padding and dilation must be ints or pairs of them"
    return None if type(conv.groups) is int else "groups must be an int"


def _why_not_norm(layer: Layer, channels: int, x: Tensor) -> str | None:
    norm = layer.unit.norm
    if norm is None or norm.source == "given":
        return None
    for t in (layer.running_mean, layer.running_var, layer.norm_weight, layer.norm_bias):
        if t is None:
            continue
        if t.numel() != channels or t.device != x.device or t.dim() != 1:
            return f"batch norm tensors must have shape [{channels}] on {x.device}"
        if layer.promotes and t.dtype != x.dtype:
            return f"a norm with tensors in {t.dtype} gives that for {x.dtype}"
        if t.dtype not in (x.dtype, torch.float32):
            return f"batch norm tensors must be {x.dtype} or float32, got {t.dtype}"
        if x.dtype == torch.float64 and t.dtype != torch.float64:
            return "batch norm tensors must be float64"
    for t in (layer.running_mean, layer.running_var):
        if t is not None and t.requires_grad:
            return "running statistics that want a gradient"
        if t is not None and layer.training and channels > 1 and t.stride(0) == 0:
            return "running statistics that share one place are updated one after the other"
    return None


def _why_not_factor(layer: Layer, shape: Shape, x: Tensor) -> str | None:
    factor = layer.factor
    if not layer.unit.scale:
        return None
    if factor is None or factor.dim() != 4 or factor.device != x.device:
        return f"the factor must have shape [N, C, 1, 1] on {x.device}"
    sizes = zip(factor.shape, shape, strict=True)
    if any([size not in (1, full) for size, full in sizes]):
        return f"the factor must fit {list(shape)}, got {list(factor.shape)}"
    return None
