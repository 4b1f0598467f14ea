"""Residual blocks to compare: the stock one, the same through `fastres.functional`, and cases."""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres import functional
from fastres.functional import ConvNorm, PoolSpec
from fastres.testing.cases import Case


@dataclass(frozen=True)
class BlockCase:
    """A residual block with its input.

    Attributes:
        name: unique in the table; seeds are derived from it.
        kind: "basic" (3x3, 3x3) or "bottleneck" (1x1, 3x3, 1x1).
        shape: [N, C, H, W] of the input.
        width: channels inside the block.
        shortcut: "identity" (the block then ends with C channels), "projection" or "pooled".
        stride: of the first 3x3 convolution and of the shortcut.
        dilation: of the 3x3 convolutions.
        groups: of the 3x3 convolutions.
        conv_bias: whether the convolutions have a bias.
        affine: whether the batch norms have weight and bias.
        training: batch statistics; else running ones.
        dtype: of activations and convolutions; batch norms stay float32 below that.
        channels_last: layout of input and weights.
        values: one of `fastres.testing.VALUES`.
        bench: a size to measure, too large for the tests.
    """

    name: str
    kind: str = "bottleneck"
    shape: tuple[int, int, int, int] = (4, 16, 6, 5)
    width: int = 8
    shortcut: str = "identity"
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    conv_bias: bool = False
    affine: bool = True
    training: bool = True
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    values: str = "normal"
    bench: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def out_channels(self) -> int:
        """Channels of the block's output."""
        if self.shortcut == "identity":
            return self.shape[1]
        return self.width if self.kind == "basic" else 4 * self.width

    def input(self, seed: str = "x", device: str = "cpu") -> Tensor:
        """The block's input."""
        case = Case(self.name, self.shape, self.dtype, self.channels_last, self.values)
        return case.activation(seed, device=device)

    def stock(self, device: str = "cpu") -> StockBlock:
        """The block out of torch's modules, with its parameters drawn from the case's seed."""
        seed = zlib.crc32(self.name.encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            block = StockBlock(self)
            block.randomise()
        fmt = torch.channels_last if self.channels_last else torch.contiguous_format
        return block.to(device=device).to(memory_format=fmt).train(self.training)  # type: ignore[call-overload,no-any-return]


class StockBlock(nn.Module):
    """A residual block as torchvision writes it, of any `BlockCase`."""

    def __init__(self, case: BlockCase) -> None:
        super().__init__()
        c, w, k = case.shape[1], case.width, case.out_channels
        three = {"dilation": case.dilation, "padding": case.dilation, "groups": case.groups}
        stages: list[tuple[int, int, int, dict[str, Any]]] = [
            (c, w, 3, {**three, "stride": case.stride}), (w, k, 3, three),
        ]  # fmt: skip
        if case.kind == "bottleneck":
            stages = [(c, w, 1, {}), (w, w, 3, {**three, "stride": case.stride}), (w, k, 1, {})]
        pooled = case.shortcut == "pooled" and case.stride > 1
        pool = nn.AvgPool2d(2, case.stride, ceil_mode=True, count_include_pad=False)
        self.pool = pool if pooled else None
        if case.shortcut != "identity":
            stages.append((c, k, 1, {"stride": 1 if pooled else case.stride}))
        self.projects = case.shortcut != "identity"
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, size, bias=case.conv_bias, dtype=case.dtype, **more)
            for i, o, size, more in stages
        )
        norm = torch.float64 if case.dtype == torch.float64 else torch.float32
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(o, affine=case.affine, dtype=norm) for _, o, _, _ in stages
        )

    def randomise(self) -> None:
        """Parameters and running statistics off their defaults, so that dropping one shows."""
        for norm in self.norms:
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None and norm.running_var is not None
            if norm.affine:
                nn.init.normal_(norm.weight, 1.0, 0.3)
                nn.init.normal_(norm.bias, 0.1, 0.3)
            nn.init.normal_(norm.running_mean, 0.0, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            norm.eps, norm.momentum = 1e-2, 0.3

    def forward(self, x: Tensor) -> Tensor:
        """The block, unfused."""
        last = len(self.convs) - 1 - self.projects
        z = x
        for i in range(last):
            z = F.relu(self.norms[i](self.convs[i](z)))
        z = self.norms[last](self.convs[last](z))
        if self.projects:
            x = x if self.pool is None else self.pool(x)
            x = self.norms[-1](self.convs[-1](x))
        return F.relu(z + x)


class FunctionalBlock(StockBlock):
    """The same block, parameters and buffers through `fastres.functional.residual_block`."""

    @classmethod
    def of(cls, stock: StockBlock) -> FunctionalBlock:
        """Share nothing but the values: a copy of `stock` that runs fused."""
        fused = copy.deepcopy(stock)
        fused.__class__ = cls
        assert isinstance(fused, cls)
        return fused

    def layer(self, index: int) -> ConvNorm:
        """Convolution and batch norm `index` in the functional API's terms."""
        conv, norm = self.convs[index], self.norms[index]
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        padding, stride, dilation = conv.padding, conv.stride, conv.dilation
        assert not isinstance(padding, str)
        return ConvNorm(
            conv.weight, norm.running_mean, norm.running_var,
            norm.weight if norm.affine else None, norm.bias if norm.affine else None, conv.bias,
            (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]),
            conv.groups, norm.training, norm.momentum or 0.0, norm.eps,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The block, fused."""
        layers = [self.layer(i) for i in range(len(self.convs))]
        for norm in self.norms:
            assert isinstance(norm, nn.BatchNorm2d) and norm.num_batches_tracked is not None
            if norm.training:
                norm.num_batches_tracked.add_(1)
        projection = layers.pop() if self.projects else None
        return functional.residual_block(x, layers, projection, pool=self.pool_spec)

    @property
    def pool_spec(self) -> PoolSpec | None:
        """The shortcut's pooling in the functional API's terms."""
        if self.pool is None:
            return None
        k, s = int(self.pool.kernel_size), int(self.pool.stride)  # type: ignore[arg-type]
        return PoolSpec((k, k), (s, s), (0, 0), True, False)


# ---------------------------------------------------------------- the table

_SHORTCUTS: dict[str, dict[str, Any]] = {
    "identity": {},
    "projection": {"shortcut": "projection"},
    "strided": {"shortcut": "projection", "stride": 2},
    "pooled": {"shortcut": "pooled", "stride": 2, "shape": (4, 16, 7, 6)},
    "dilated": {"dilation": 2, "conv_bias": True},
    "groups": {"groups": 4},
    "eval": {"training": False, "conv_bias": True, "shortcut": "projection"},
    "plain": {"affine": False, "channels_last": False},
}


def _build() -> tuple[BlockCase, ...]:
    cases = []
    for kind in ("basic", "bottleneck"):
        for name, changes in _SHORTCUTS.items():
            cases.append(replace(BlockCase(f"{kind}-{name}", kind), **changes))
    for dtype in (torch.bfloat16, torch.float16):
        short = str(dtype).removeprefix("torch.")
        for name in ("identity", "strided"):
            # Large enough for several ReLUs to open in one run and not in another: the few of a
            # small block are luck.
            case = BlockCase(f"bottleneck-{name}-{short}", dtype=dtype, shape=(8, 32, 20, 20))
            cases.append(replace(case, **_SHORTCUTS[name]))
    for values in ("large_mean", "constant", "outlier", "nan", "inf", "negative_zero"):
        shape = (8, 16, 12, 12) if values == "large_mean" else (4, 16, 6, 5)
        cases.append(BlockCase(f"bottleneck-{values}", values=values, shape=shape))
    # 16 values per channel: of 4, torch's own error is a matter of luck.
    cases.append(BlockCase("bottleneck-pixel", shape=(16, 16, 1, 1)))
    cases.append(BlockCase("basic-thin", "basic", (3, 1, 5, 5), 3, "projection"))
    return tuple(cases)


#: What the tests run on.
BLOCK_CASES: tuple[BlockCase, ...] = _build()


def _resnet50(batch: int, dtype: torch.dtype) -> tuple[BlockCase, ...]:
    """An identity bottleneck of each of ResNet-50's stages at 224 pixels."""
    short = str(dtype).removeprefix("torch.")
    return tuple(
        BlockCase(
            f"resnet50-{width}x{size}-{short}", shape=(batch, 4 * width, size, size), width=width,
            dtype=dtype, bench=True,
        )
        for width, size in ((64, 56), (128, 28), (256, 14), (512, 7))
    )  # fmt: skip


#: What the benchmarks run on.
BENCH_BLOCKS: tuple[BlockCase, ...] = (
    *_resnet50(16, torch.float32),
    *_resnet50(16, torch.bfloat16),
)
