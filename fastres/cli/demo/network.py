"""The demo's network: a small ResNet out of torchvision's own Bottleneck blocks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from fastres.cli.libraries import library

#: Blocks and stride of each stage, and the width of the first, which keeps the resolution of
#: small images as in section 4.2 of He et al. 2015. The second divides it by four: enlarged
#: images are smooth, and a 3x3 convolution has to see more of them.
DEPTH, STRIDES, WIDTH = (2, 2, 2), (1, 4, 2), 16


def build(seed: int) -> nn.Module:
    """The stock network, initialised from the seed: [N, 1, S, S] -> [N, 10]."""
    resnet: Any = library("torchvision.models.resnet", "torchvision")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = [
            ("conv1", nn.Conv2d(1, WIDTH, 3, padding=1, bias=False)),
            ("bn1", nn.BatchNorm2d(WIDTH)),
            ("relu", nn.ReLU(inplace=True)),
        ]
        stages, channels = [], WIDTH
        for i, (depth, stride) in enumerate(zip(DEPTH, STRIDES, strict=True)):
            stage, channels = _stage(resnet.Bottleneck, channels, WIDTH * 2**i, depth, stride)
            stages.append((f"layer{i + 1}", stage))
        head = [
            ("avgpool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("fc", nn.Linear(channels, 10)),
        ]
        return nn.Sequential(OrderedDict([*stem, *stages, *head]))


def _stage(
    block: Any, channels: int, planes: int, depth: int, stride: int
) -> tuple[nn.Sequential, int]:
    out = planes * block.expansion
    downsample = nn.Sequential(
        nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
    )
    blocks = [block(channels, planes, stride, downsample)]
    blocks += [block(out, planes) for _ in range(depth - 1)]
    for each in blocks:
        # Every block starts as its shortcut (Goyal et al. 2017), so that early training does not
        # amplify rounding and two runs can be compared for longer.
        nn.init.zeros_(each.bn3.weight)
    return nn.Sequential(*blocks), out
