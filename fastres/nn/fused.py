"""Runs a block of modules fused, where its children allow it; else says what is in the way."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastres.block import (
    Block,
    Layer,
    Norm,
    Unit,
    activate,
    output_shapes,
    run_open,
    try_layers,
    why_not_layers,
)
from fastres.block.call import autocasts, execute
from fastres.block.check import why_not_settings
from fastres.kernels import memory_format_of
from fastres.nn.bound import bound_of, simple
from fastres.nn.factors import draw, excite
from fastres.nn.genuine import as_written
from fastres.nn.match import Decline, Match, Parts, match, why_not_now


def run_fused(module: FusedParts, x: Tensor) -> Tensor | None:
    """The output of a module's parts, or None where the stock path has to run; then nothing was
    changed.
    """
    if not isinstance(x, Tensor) or why_not_now() is not None:
        return None
    cls = type(module)
    if torch.compiler.is_compiling() or not simple(x):
        matched = match(parts_now(module, cls))
        return None if isinstance(matched, Decline) else run_match(matched, x)
    if why_not_written(cls) is not None:
        return None
    bound = bound_of(module) or bound_of(module, parts_now(module, cls))
    if bound is None:
        return None
    if bound.match.drops or bound.match.gate is not None:
        return run_match(bound.match, x)
    if autocasts(x.device.type):
        return bound.run_autocast(x)
    call = bound.call(x)
    return None if call is None else execute(call, x)


def run_match(
    matched: Match, x: Tensor, residual: Tensor | None = None, factor: Tensor | None = None
) -> Tensor | None:
    """As `run_fused`. Random numbers are drawn only where the block will run.

    Args:
        matched: what is run.
        x: [N, C, H, W].
        residual: what is added, for the shortcut "tensor".
        factor: what the first unit multiplies by, where a `Factor` stands for it; of x's dtype.
    """
    block, layers, drops, gate = matched
    if gate is not None:
        return _run_gated(matched, gate, x)
    if not drops:
        return try_layers(x, block, layers, residual)
    complete = placeholders(matched, x)
    if factor is not None:
        if not isinstance(factor, Tensor) or factor.dtype != x.dtype:
            return None
        complete[0] = layers[0]._replace(factor=factor)
    if why_not_layers(x, block, complete, residual) is not None:
        return None
    drawn = drops if factor is None else drops[1:]
    complete = with_factors(matched._replace(drops=drawn), x)
    if factor is not None:
        complete[0] = layers[0]._replace(factor=factor)
    return try_layers(x, block, complete, residual)


#: What stands behind a gate: statistics known by now are applied, and then a factor.
_APPLIED = Unit(None, Norm(0.0, "given"))
_SCALED = _APPLIED._replace(scale=True)


def _run_gated(matched: Match, gate: nn.Module, x: Tensor) -> Tensor | None:
    """As `run_match`, in two blocks: one up to the mean that the gate reads, and one from there."""
    if why_not_layers(x, matched.block, placeholders(matched, x)) is not None:
        return None
    last = len(matched.block.units) - 1
    inner = tuple([drop for drop in matched.drops if drop[0] != last])
    layers = with_factors(matched._replace(drops=inner), x)
    unit = layers[last].unit._replace(scale=False)
    units = (*matched.block.units[:-1], unit)
    opened = run_open(x, Block(units), [*layers[:last], layers[last]._replace(unit=unit)])
    assert opened is not None
    raw, stats, mean = opened
    factor = excite(gate, mean.to(raw.dtype)[:, :, None, None])
    for index, module in matched.drops:
        if index == last:
            factor = factor * draw(module, raw, raw.shape, memory_format_of(raw))
    block, residual = _behind(matched.block), _shortcut(matched, x, raw.dtype)
    out = try_layers(raw, block, [Layer(_SCALED, running_mean=stats, factor=factor)], residual)
    if out is not None:
        return out
    # A factor of an odd shape: torch broadcasts it, or says what is wrong with it.
    z = try_layers(raw, Block((_APPLIED,)), [Layer(_APPLIED, running_mean=stats)])
    assert z is not None
    z = z * factor
    return activate(z if residual is None else z + residual, block.act)


def _behind(block: Block) -> Block:
    """The block behind a gate."""
    return Block((_SCALED,), "none" if block.shortcut == "none" else "tensor", act=block.act)


def _shortcut(matched: Match, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What a shortcut from the input adds, run as a block of its own where it has a projection."""
    block = matched.block
    if block.shortcut == "none":
        return None
    if block.projection is None:
        return x.to(dtype)
    pooled = x if block.pool is None else block.pool.apply(x)
    residual = try_layers(pooled, Block((block.projection,)), matched.layers[-1:])
    assert residual is not None
    return residual


def with_factors(matched: Match, x: Tensor) -> list[Layer]:
    """The layers with the factors that their dropout and stochastic depth draw now."""
    block, layers, drops, _ = matched
    weights = [layer.weight for layer in layers]
    shapes = output_shapes(block, x.shape, [None if w is None else (*w.shape,) for w in weights])
    complete, fmt = list(layers), memory_format_of(x, weights)
    like = x if weights[0] is None else x.to(autocast_dtype(x))
    for index, module in drops:
        factor = draw(module, like, shapes[index], fmt)
        complete[index] = layers[index]._replace(factor=factor)
    return complete


def placeholders(matched: Match, x: Tensor) -> list[Layer]:
    """The layers with factors of a fitting shape, to look at and not to run."""
    complete = list(matched.layers)
    for index in range(len(matched.block.units)):
        if not complete[index].unit.scale:
            continue
        complete[index] = complete[index]._replace(factor=x.new_empty(1, 1, 1, 1))
    return complete


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x gives now."""
    if x.dtype == torch.float64 or not autocasts(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def why_not_parts(block: nn.Module, parts: Parts | Decline, x: Tensor | None) -> str | None:
    """Why a block runs its stock path, or None; nothing runs."""
    if (reason := why_not_now()) is not None:
        return reason
    matched = match(parts)
    if isinstance(matched, Decline):
        return explained(block, matched)
    for unit in matched.block.all_units:
        if (reason := why_not_settings(unit)) is not None:
            return reason
    return None if x is None else why_not_layers(x, matched.block, placeholders(matched, x))


def explained(block: nn.Module, decline: Decline) -> str:
    """A reason in words, with the name that the child has in its block."""
    names = [name for name, child in block.named_modules() if child is decline.module]
    return f"{names[0]} {decline.text}" if names and names[0] else decline.text


def why_not_written(fused: Any) -> str | None:
    """Which method that a subclass of FusedParts stands for was replaced on its class, or None."""
    name = fused._replaces
    if fused._stock is not None and getattr(fused._stock, name) is not fused._stock_forward:
        return f"{fused._stock.__name__}.{name} is not what it was written as"
    for cls, forward in fused._inner.items():
        if cls.forward is not forward:
            return f"{cls.__name__}.forward is not what it was written as"
    return None


def parts_now(module: Any, fused: Any) -> Parts | Decline:
    """What `module` would be made of as a `fused`, a subclass of FusedParts, or why it is not."""
    if (text := why_not_written(fused)) is not None:
        return Decline(None, text, permanent=False)
    try:
        return fused._parts(module)
    except (KeyError, AttributeError) as error:
        return Decline(None, f"has no such part: {error}")


class FusedParts(nn.Module):
    """A module that runs some of its children fused where it can.

    A subclass says in `_parts` what they make up, in `_replaces` the method that it overrides of
    the stock class behind it, and in `_inner` the classes of children that are looked into and not
    called, with the forward that these were written with. One that `_wraps` a child which is fused
    by itself leaves it to that where it cannot be fused as a whole.
    """

    _replaces: ClassVar[str] = "forward"
    _stock: ClassVar[Any] = None
    _stock_forward: ClassVar[Any] = None
    _inner: ClassVar[dict[Any, Any]] = {}
    _wraps: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        behind = cls.__mro__[cls.__mro__.index(FusedParts) + 1 :]
        plain = getattr(nn.Module, cls._replaces, None)
        stock = next((c for c in behind if getattr(c, cls._replaces, plain) is not plain), None)
        if stock not in (None, cls._stock):
            cls._stock, cls._stock_forward = stock, as_written(stock, cls._replaces)

    def _parts(self) -> Parts | Decline:
        raise NotImplementedError(f"{type(self).__name__} must define _parts")

    def why_not(self, x: Tensor | None = None) -> str | None:
        """Why the stock path would run now, or None; nothing is computed.

        Args:
            x: [N, C, H, W], or None to look at the module alone.
        """
        if self._replaces in self.__dict__:
            return f"has its {self._replaces} replaced"
        return why_not_parts(self, parts_now(self, type(self)), x)

    def matched(self) -> Match | None:
        """What would be run fused, in the terms of `fastres.block`; None where it is not."""
        matched = match(parts_now(self, type(self)))
        return matched if isinstance(matched, Match) else None
