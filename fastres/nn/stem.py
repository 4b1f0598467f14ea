"""The stem of a ResNet, its first convolution with batch norm and ReLU, in one operation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.nn._children import Parts
from fastres.nn._fused import Layers, layers_of, run_parts, why_not_parts


class FusedStem(nn.Module):
    """Gives a network with torchvision's attribute names a fused `conv1`, `bn1`, `relu`.

    Comes before the network's class among the bases; all of the rest is called as torchvision
    does.
    """

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module
    fc: nn.Module

    def _parts(self) -> Parts:
        m = self._modules
        conv, norm, relu = m["conv1"], m["bn1"], m["relu"]
        assert conv is not None and norm is not None
        return Parts(((conv, norm, relu),), relu, kind="none")

    def _stem(self, x: Tensor) -> Tensor:
        out = run_parts(self._parts(), x)
        return self.relu(self.bn1(self.conv1(x))) if out is None else out

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self._stem(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(self.avgpool(x), 1)
        logits: Tensor = self.fc(x)
        return logits

    def why_not(self, x: Tensor | None = None) -> str | None:
        """Why the stem's stock path would run now, or None; as `FusedModule.why_not`."""
        return why_not_parts(self, self._parts(), x)

    def layers(self) -> Layers | None:
        """What would be run fused; as `FusedModule.layers`."""
        found = layers_of(self._parts())
        return found if isinstance(found, Layers) else None
