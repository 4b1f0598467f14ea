"""Other people's fused blocks, put into stock networks with torchvision's attribute names.

Both swap the class of a block for a subclass with a forward of its own; what a block does
otherwise stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastres.cli.libraries import library

#: InPlaceABN's default: its activation has to be invertible, so ReLU is not among its choices.
SLOPE = 0.01


def units(block: nn.Module) -> list[tuple[str, str]]:
    """(convolution, norm) names of a residual block with torchvision's names; [] of anything else.

    Raises nothing: a module that only looks alike (no `relu`, `downsample`) is not one.
    """
    names = {name for name, _ in block.named_children()} | set(vars(block))
    if not {"conv1", "bn1", "conv2", "bn2", "relu", "downsample"} <= names:
        return []
    return [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if {f"conv{i}", f"bn{i}"} <= names]


def _swap(model: nn.Module, forward: Any, name: str) -> list[nn.Module]:
    """Give every residual block a forward; ValueError where there is none."""
    blocks = [module for module in model.modules() if units(module)]
    if not blocks:
        raise ValueError("the network has no block with torchvision's attribute names")
    for block in blocks:
        block.__class__ = type(name, (type(block),), {"forward": forward})
    return blocks


# ---------------------------------------------------------------- InPlaceABN


def with_inplace_abn(model: nn.Module) -> None:
    """Inner norms and activations in place (Rota Bulo et al. 2018), as leaky ReLU.

    The network is another function then: its parity is that to `leaky_twin`.
    """
    abn = library("inplace_abn").InPlaceABN
    for block in _swap(model, _inplace_forward, "InPlaceBlock"):
        for _, name in units(block)[:-1]:
            norm = getattr(block, name)
            inplace = abn(
                norm.num_features, norm.eps, norm.momentum, activation="leaky_relu",
                activation_param=SLOPE,
            )  # fmt: skip
            inplace.load_state_dict(norm.state_dict(), strict=False)
            setattr(block, name, inplace.to(norm.weight.device))


def _inplace_forward(self: Any, x: Tensor) -> Tensor:
    *inner, (conv, norm) = units(self)
    out = x
    for inner_conv, inner_norm in inner:
        out = getattr(self, inner_norm)(getattr(self, inner_conv)(out))
    out = getattr(self, norm)(getattr(self, conv)(out))
    out += x if self.downsample is None else self.downsample(x)
    return self.relu(out)


def leaky_twin(model: nn.Module) -> None:
    """What `with_inplace_abn` computes, out of torch's own modules."""
    _swap(model, _leaky_forward, "LeakyBlock")


def _leaky_forward(self: Any, x: Tensor) -> Tensor:
    *inner, (conv, norm) = units(self)
    out = x
    for inner_conv, inner_norm in inner:
        out = getattr(self, inner_norm)(getattr(self, inner_conv)(out))
        out = nn.functional.leaky_relu(out, SLOPE)
    out = getattr(self, norm)(getattr(self, conv)(out))
    out += x if self.downsample is None else self.downsample(x)
    return self.relu(out)


# ---------------------------------------------------------------- cuDNN


def with_cudnn(model: nn.Module) -> None:
    """Inference with norms folded into convolutions that end in add and ReLU, by cuDNN."""
    for block in _swap(model, _cudnn_forward, "CudnnBlock"):
        for conv, norm in units(block):
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
            setattr(block, norm, nn.Identity())
        shortcut = block.downsample
        if isinstance(shortcut, nn.Sequential) and len(shortcut) == 2:
            block.downsample = fuse_conv_bn_eval(*shortcut)


def _cudnn_forward(self: Any, x: Tensor) -> Tensor:
    *inner, (last, _) = units(self)
    out = x
    for name, _ in inner:
        conv = getattr(self, name)
        out = torch.cudnn_convolution_relu(out, *_geometry(conv))
    residual = x if self.downsample is None else self.downsample(x)
    weight, *rest = _geometry(getattr(self, last))
    return torch.cudnn_convolution_add_relu(out, weight, residual, 1.0, *rest)


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    """A convolution as torch.cudnn_convolution_relu takes it."""
    return conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
