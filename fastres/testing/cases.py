"""One table of cases: what every implementation is tested on, and what is benchmarked.

A case is plain data. Its tensors are drawn from a seed on the CPU and then moved, so that the same
case holds the same numbers on every device.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastres.kernels import Conv, dense

#: What a case's activations may look like; see `_fill`.
VALUES = (
    "normal", "large_mean", "constant", "outlier", "nan", "inf", "negative_zero", "integers",
    "tails",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Inputs of a primitive.

    Attributes:
        name: unique in its table; the seed is derived from it.
        shape: [N, C, H, W] of the activation.
        dtype: dtype of the activations and convolution weights.
        channels_last: layout of the activations.
        values: one of `VALUES`.
        conv: geometry for the convolution primitives; None leaves them out.
        kernel: (kh, kw).
        out_channels: K of the convolution.
        bench: a size to measure, too large for the tests.
        every_act: whether its calls are made with every activation, and not with ReLU and those
            from outside alone.
    """

    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    values: str = "normal"
    conv: Conv | None = None
    kernel: tuple[int, int] = (1, 1)
    out_channels: int = 8
    bench: bool = False
    every_act: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def count(self) -> int:
        """Values per channel, M = N*H*W."""
        n, _, h, w = self.shape
        return n * h * w

    @property
    def exact(self) -> bool:
        """Whether every sum of the case is exact in float32, so that results compare by bits."""
        return self.values == "integers"

    def generator(self, seed: str = "") -> torch.Generator:
        """A generator seeded by the case's name and `seed`, the same in every process."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.name}/{seed}".encode()))

    def activation(
        self, seed: str, *, shape: Sequence[int] | None = None, device: str = "cpu"
    ) -> Tensor:
        """An activation of the case's shape (or `shape`), dtype, layout and values."""
        t = _fill(self.values, tuple(shape or self.shape), self.generator(seed))
        fmt = torch.channels_last if self.channels_last else torch.contiguous_format
        return dense(t.to(self.dtype), fmt).to(device)

    def gradient(
        self, seed: str, *, shape: Sequence[int] | None = None, device: str = "cpu"
    ) -> Tensor:
        """A gradient beside the activations: normal, or integers where those are."""
        plain = replace(self, values="integers" if self.exact else "normal")
        return plain.activation(seed, shape=shape, device=device)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[K, C/groups, kh, kw] of the convolution's weight."""
        assert self.conv is not None
        return self.out_channels, self.shape[1] // self.conv.groups, *self.kernel

    def weight(self, seed: str = "weight", *, device: str = "cpu") -> Tensor:
        """A convolution weight [K, C/groups, kh, kw], scaled to keep the output's variance."""
        shape = self.weight_shape
        fan_in = shape[1] * shape[2] * shape[3]
        g = self.generator(seed)
        if self.exact:
            w = torch.randint(-1, 2, shape, generator=g).float()
        else:
            w = torch.randn(shape, generator=g) / fan_in**0.5
        fmt = torch.channels_last if self.channels_last else torch.contiguous_format
        return w.to(self.dtype).contiguous(memory_format=fmt).to(device)

    def vector(
        self, seed: str, size: int, *, near: float = 0.0, dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Tensor:  # fmt: skip
        """A parameter [size] around `near`, a power of two or an integer in exact cases."""
        g = self.generator(seed)
        if self.exact:
            v = torch.randint(-1, 2, (size,), generator=g).float()
            v = v if near == 0 else 2.0**v
        else:
            v = near + 0.3 * torch.randn(size, generator=g)
        return v.to(dtype).to(device)


def _fill(values: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """float32 [N, C, H, W] of the distribution that `values` names."""
    if values == "integers":
        return _integers(shape, g)
    t = torch.randn(shape, generator=g)
    channel = shape[1] // 2
    if values == "large_mean":
        t += 1e4
    elif values == "negative_zero":
        t = torch.where(t.abs() < 0.7, torch.full_like(t, -0.0), t)
    elif t.numel() == 0 or values == "normal":
        return t
    elif values == "tails":  # normalised they reach beyond -6 and 6, where activations bend
        return torch.where(torch.rand(shape, generator=g) < 1 / 16, 6 * t, t)
    elif values == "constant":
        t[:, channel] = 3.25
    elif values == "outlier":
        t[-1, channel, -1, -1] = 1e4
    else:
        t[-1, channel, -1, 0] = {"nan": float("nan"), "inf": float("inf")}[values]
    return t


def _integers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Integers of -2..2; the second half of the batch mirrors the first, so that means are 0."""
    t = torch.randint(-2, 3, shape, generator=g).float()
    half = shape[0] // 2
    t[half : 2 * half] = -t[:half]
    return t


# ---------------------------------------------------------------- the table

_BASE = Case("base", (2, 16, 6, 5), conv=Conv(padding=(1, 1)), kernel=(3, 3))
_POINTWISE = Conv()

#: Sizes: C that fills no vector, exactly some, and more; H*W of one pixel; one value in all.
_SHAPES = (
    (2, 3, 5, 7), (3, 17, 1, 1), (5, 1, 3, 3), (1, 64, 7, 7), (1, 1, 1, 1), (4, 100, 2, 3),
    (2, 8, 33, 31), (33, 24, 3, 2),
)  # fmt: skip

_GEOMETRIES = {
    "stride2": {"conv": Conv((2, 2), (1, 1)), "kernel": (3, 3)},
    "dilated": {"conv": Conv((1, 1), (2, 2), (2, 2)), "kernel": (3, 3)},
    "groups": {"conv": Conv((1, 1), (1, 1), (1, 1), 4), "kernel": (3, 3)},
    "depthwise": {"conv": Conv((2, 1), (1, 1), (1, 1), 16), "kernel": (3, 3), "out_channels": 16},
    "groups of 16": {
        "conv": Conv((2, 2), (1, 1), (1, 1), 2),
        "kernel": (3, 3),
        "shape": (2, 32, 6, 5),
        "out_channels": 36,
    },
    "1x1": {"conv": _POINTWISE, "kernel": (1, 1)},
    "1x1stride2": {"conv": Conv((2, 2)), "kernel": (1, 1)},
    "1x1wide": {"conv": _POINTWISE, "kernel": (1, 1), "out_channels": 96, "shape": (2, 32, 4, 4)},
    "5x3": {"conv": Conv((1, 2), (2, 1)), "kernel": (5, 3), "out_channels": 3},
    "unpadded": {"conv": Conv(), "kernel": (3, 3)},
}


def _layouts(case: Case) -> list[Case]:
    return [
        replace(case, name=f"{case.name}-{'nhwc' if last else 'nchw'}", channels_last=last)
        for last in (True, False)
    ]


def _short(dtype: torch.dtype) -> str:
    names = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
    return names[str(dtype).removeprefix("torch.")]


def _named(**changes: object) -> list[Case]:
    """The base case with changes, named after them, in both layouts."""
    case = replace(_BASE, **changes)  # type: ignore[arg-type]
    size = "x".join(map(str, case.shape))
    return _layouts(replace(case, name=f"{case.values}-{size}-{_short(case.dtype)}"))


def _build() -> tuple[Case, ...]:
    low = (torch.bfloat16, torch.float16)
    cases: list[Case] = []
    for shape in _SHAPES:
        cases += _named(shape=shape, conv=_POINTWISE, kernel=(1, 1))
    for dtype in (torch.float64, *low):
        cases += _named(dtype=dtype)
        cases += _named(dtype=dtype, shape=(3, 17, 5, 1))
    for values in VALUES[1:]:
        shape = (8, 16, 4, 4) if values == "integers" else (4, 17, 5, 4)
        for dtype in (torch.float32, torch.bfloat16):
            cases += _named(values=values, dtype=dtype, shape=shape, every_act=values == "tails")
    vectors = {"values": "tails", "shape": (4, 24, 4, 4), "conv": None, "every_act": True}
    for dtype, layout in zip((torch.float32, torch.float64, *low), (0, 1, 1, 0), strict=True):
        cases.append(_named(dtype=dtype, **vectors)[layout])
    for geometry, changes in _GEOMETRIES.items():
        for dtype in (torch.float32, torch.bfloat16):
            case = replace(_BASE, dtype=dtype, **changes)  # type: ignore[arg-type]
            cases += _layouts(replace(case, name=f"{geometry}-{_short(dtype)}"))
    cases += _named(shape=(0, 8, 4, 4), conv=None)
    return tuple(cases)


#: What the tests run on.
CASES: tuple[Case, ...] = _build()


def _resnet50(batch: int, dtype: torch.dtype) -> tuple[Case, ...]:
    """The convolutions inside ResNet-50's four stages at 224 pixels (He et al. 2015, table 1)."""
    cases = []
    for width, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        three = {"conv": Conv(padding=(1, 1)), "kernel": (3, 3), "out_channels": width}
        for name, channels, changes in (
            ("reduce", 4 * width, {"conv": _POINTWISE, "out_channels": width}),
            ("3x3", width, three),
            ("expand", width, {"conv": _POINTWISE, "out_channels": 4 * width}),
        ):
            label = f"resnet50-{name}-{width}x{size}-{_short(dtype)}"
            case = Case(label, (batch, channels, size, size), dtype, bench=True)
            cases.append(replace(case, **changes))  # type: ignore[arg-type]
    return tuple(cases)


#: What the benchmarks run on.
BENCH_CASES: tuple[Case, ...] = (
    *_resnet50(16, torch.float32),
    *_resnet50(16, torch.bfloat16),
)
