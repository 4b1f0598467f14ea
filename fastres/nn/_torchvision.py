"""Our blocks as torchvision's own: its ResNet initialises by isinstance of its classes.

Imported only where torchvision's ResNet already is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchvision.models import resnet

from fastres.nn import blocks


class BasicBlock(blocks.BasicBlock, resnet.BasicBlock):  # type: ignore[misc]
    """`fastres.BasicBlock`, an instance of torchvision's class too."""

    def __reduce__(self) -> tuple[Callable[[type], Any], tuple[type], dict[str, Any]]:
        """Pickled under the public class, so that loading does not need torchvision."""
        return blocks.rebuild, (blocks.BasicBlock,), self.__dict__


class Bottleneck(blocks.Bottleneck, resnet.Bottleneck):  # type: ignore[misc]
    """`fastres.Bottleneck`, an instance of torchvision's class too."""

    def __reduce__(self) -> tuple[Callable[[type], Any], tuple[type], dict[str, Any]]:
        """Pickled under the public class, so that loading does not need torchvision."""
        return blocks.rebuild, (blocks.Bottleneck,), self.__dict__
