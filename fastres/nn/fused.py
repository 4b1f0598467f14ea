"""Runs a block of modules fused, where its children allow it; else says what is in the way."""

from __future__ import annotations

from torch import Tensor, nn

from fastres.block import try_layers, why_not_layers
from fastres.nn.match import Decline, Match, Parts, match, why_not_now


def run_parts(parts: Parts | Decline, x: Tensor) -> Tensor | None:
    """The block's output, or None where the stock path has to run; then nothing was changed."""
    if not isinstance(x, Tensor) or why_not_now() is not None:
        return None
    matched = match(parts)
    return None if isinstance(matched, Decline) else try_layers(x, *matched)


def why_not_parts(block: nn.Module, parts: Parts | Decline, x: Tensor | None) -> str | None:
    """Why a block runs its stock path, or None; nothing runs."""
    if (reason := why_not_now()) is not None:
        return reason
    matched = match(parts)
    if isinstance(matched, Decline):
        return explained(block, matched)
    return None if x is None else why_not_layers(x, *matched)


def explained(block: nn.Module, decline: Decline) -> str:
    """A reason in words, with the name that the child has in its block."""
    names = [name for name, child in block.named_modules() if child is decline.module]
    return f"{names[0]} {decline.text}" if names and names[0] else decline.text


class FusedParts(nn.Module):
    """A module that runs some of its children fused where it can.

    A subclass says in `_parts` what they make up.
    """

    def _parts(self) -> Parts | Decline:
        raise NotImplementedError(f"{type(self).__name__} must define _parts")

    def why_not(self, x: Tensor | None = None) -> str | None:
        """Why the stock path would run now, or None; nothing is computed.

        Args:
            x: [N, C, H, W], or None to look at the module alone.
        """
        return why_not_parts(self, self._parts(), x)

    def matched(self) -> Match | None:
        """What would be run fused, in the terms of `fastres.block`; None where it is not."""
        found = match(self._parts())
        return found if isinstance(found, Match) else None
