"""Runs a block of modules fused, where its children allow it; else says what is in the way."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fastres.block import BlockSpec, PoolSpec
from fastres.block.call import try_layers, why_not_layers
from fastres.block.eligible import why_not_settings
from fastres.block.layers import ConvNorm
from fastres.nn._children import (
    Decline,
    Parts,
    Projection,
    activation_of,
    conv_norm,
    first_hooked,
    hooked,
    pool_of,
    projection_of,
    why_not_now,
)
from fastres.nn._genuine import Identity, as_written


class Layers(NamedTuple):
    """A block in the terms of the functional API."""

    units: list[ConvNorm]
    shortcut: str
    projection: ConvNorm | None
    pool: PoolSpec | None
    act: str

    @property
    def everything(self) -> list[ConvNorm]:
        """The main path and the projection."""
        return self.units if self.projection is None else [*self.units, self.projection]

    def spec(self, **choices: Any) -> BlockSpec:
        """The block's specification; `choices` are save, memory, backend and level."""
        return BlockSpec(
            units=tuple(layer.spec for layer in self.units),
            shortcut=self.shortcut,
            projection=None if self.projection is None else self.projection.spec,
            pool=self.pool,
            act=self.act,
            **choices,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the functional layer."""
        return {
            "shortcut": self.shortcut,
            "projection": self.projection,
            "pool": self.pool,
            "act": self.act,
        }


def layers_of(parts: Parts | Decline) -> Layers | Decline:
    """What a block computes, read off its children as they are now."""
    if isinstance(parts, Decline):
        return parts
    decline = first_hooked(parts.containers) or _why_not_passive(parts.passive)
    if decline is not None:
        return decline
    units: list[ConvNorm] = []
    for conv, norm, act in parts.units:
        unit = conv_norm(conv, norm, act)
        if isinstance(unit, Decline):
            return unit
        units.append(unit)
    if parts.kind != "none" and units[-1].act != "none":
        return Decline(parts.units[-1][2], "stands in front of the addition")
    act_name = activation_of(parts.end)
    if isinstance(act_name, Decline):
        return act_name
    layers = Layers(units, parts.kind, None, None, act_name)
    return layers if parts.shortcut is None else _with_projection(layers, parts.shortcut)


def _with_projection(layers: Layers, shortcut: nn.Module | Projection) -> Layers | Decline:
    found = projection_of(shortcut)
    if found is None or isinstance(found, Decline):
        return layers if found is None else found
    projection = conv_norm(found.conv, found.norm, None)
    if isinstance(projection, Decline):
        return projection
    pool = pool_of(found.pool)
    if isinstance(pool, Decline):
        return pool
    return Layers(layers.units, "projection", projection, pool, layers.act)


def _why_not_passive(modules: tuple[nn.Module | None, ...]) -> Decline | None:
    for module in modules:
        if module is None:
            continue
        if type(module) is not Identity:
            return Decline(module, f"is a {type(module).__name__}, which is not fused")
        if (decline := hooked(module)) is not None:
            return decline
    return None


def run_parts(parts: Parts | Decline, x: Tensor) -> Tensor | None:
    """The block's output, or None where the stock path has to run; then nothing was changed."""
    if not isinstance(x, Tensor) or why_not_now() is not None:
        return None
    layers = layers_of(parts)
    return None if isinstance(layers, Decline) else run_fused(layers, x)


def run_fused(layers: Layers, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
    """Run layers, or None where these inputs cannot be fused."""
    return try_layers(x, layers.units, residual=residual, **layers.arguments)


def why_not_parts(block: nn.Module, parts: Parts | Decline, x: Tensor | None) -> str | None:
    """Why a block runs its stock path, or None; nothing runs."""
    if (reason := why_not_now()) is not None:
        return reason
    layers = layers_of(parts)
    if isinstance(layers, Decline):
        return explained(block, layers)
    for layer in layers.everything:
        if (reason := why_not_settings(layer)) is not None:
            return reason
    return None if x is None else why_not_layers(x, layers.units, **layers.arguments)


def explained(block: nn.Module, decline: Decline) -> str:
    """A reason in words, with the name that the child has in its block."""
    names = [name for name, child in block.named_modules() if child is decline.module]
    return f"{names[0]} {decline.text}" if names and names[0] else decline.text


def parts_now(module: Any, fused: Any) -> Parts | Decline:
    """What `module` would be made of as a `fused`, a subclass of FusedParts, or why it is not."""
    name = fused._replaces
    if fused._stock is not None and getattr(fused._stock, name) is not fused._stock_forward:
        text = f"{fused._stock.__name__}.{name} is not what it was written as"
        return Decline(None, text, lasting=False)
    try:
        return fused._parts(module)
    except (KeyError, AttributeError) as error:
        return Decline(None, f"has no such part: {error}")


class FusedParts(nn.Module):
    """A module that runs some of its children fused where it can.

    A subclass says in `_parts` what they make up, and in `_replaces` the method that it overrides
    of the stock class behind it.
    """

    _replaces: ClassVar[str] = "forward"
    _stock: ClassVar[Any] = None
    _stock_forward: ClassVar[Any] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        behind = cls.__mro__[cls.__mro__.index(FusedParts) + 1 :]
        own = [c for c in behind if cls._replaces in c.__dict__ and c is not nn.Module]
        if own and own[0] is not cls._stock:
            cls._stock, cls._stock_forward = own[0], as_written(own[0], cls._replaces)

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

    def layers(self) -> Layers | None:
        """What would be run fused, in the terms of `fastres.functional`; None where it is not."""
        found = layers_of(parts_now(self, type(self)))
        return found if isinstance(found, Layers) else None
