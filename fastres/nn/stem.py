"""The stem of a ResNet, with its pooling, in one operation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fastres.nn.fused import FusedParts, run_fused
from fastres.nn.match import Decline, Parts, Steps, children_of, max_pool_of


class FusedStem(FusedParts):
    """Comes before a network's class among the bases, and runs its stem fused where it can.

    A subclass calls `fused_stem` in its forward, and names its parts `with_pooling`.
    """

    maxpool: nn.Module

    def fused_stem(self, x: Tensor) -> Tensor | None:
        """The stem's output, pooled, or None where its children have to run; then nothing was
        changed.
        """
        out = run_fused(self, x)
        # What is no max pooling to be fused is called, hooks and all.
        if out is not None and isinstance(max_pool_of(self.maxpool), Decline):
            out = self.maxpool(out)
        return out


def with_pooling(parts: Parts, network: nn.Module) -> Parts:
    """The parts of a network's stem and the pooling behind them, where that can be fused."""
    pool = children_of(network)["maxpool"]
    if isinstance(max_pool_of(pool), Decline):
        return parts._replace(watched=(pool,))
    return parts._replace(max_pool=pool)


class FusedResNetStem(FusedStem):
    """Gives a network with torchvision's attribute names a fused `conv1`, `bn1`, `relu`, `maxpool`.

    All of the rest is called as torchvision does.
    """

    _replaces: ClassVar[str] = "_forward_impl"

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module
    fc: nn.Module

    def _parts(self) -> Parts:
        m = children_of(self)
        return with_pooling(Parts((Steps(m["conv1"], m["bn1"]),), m["relu"], "none"), self)

    def _forward_impl(self, x: Tensor) -> Tensor:
        out = self.fused_stem(x)
        if out is None and self._stock is not None:
            logits: Tensor = super()._forward_impl(x)  # type: ignore[misc]
            return logits
        x = self.maxpool(self.relu(self.bn1(self.conv1(x)))) if out is None else out
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(self.avgpool(x), 1)
        logits = self.fc(x)
        return logits
