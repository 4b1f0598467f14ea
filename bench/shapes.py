"""The blocks and convolutions that are timed: ResNet-50's at 224 pixels (He et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockShape:
    """A bottleneck: input [batch, channels, size, size], `width` inner channels."""

    channels: int
    width: int
    size: int
    stride: int = 1
    batch: int = 16

    @property
    def outputs(self) -> int:
        """Channels of the block's output."""
        return 4 * self.width

    @property
    def projected(self) -> bool:
        """Whether the shortcut is a projection."""
        return self.stride != 1 or self.channels != self.outputs

    @property
    def name(self) -> str:
        """What tables call it."""
        kind = f", stride {self.stride}, projection" if self.projected else ""
        return f"{self.channels}-{self.width}, {self.size}x{self.size}{kind}"


IDENTITY = tuple(BlockShape(c, c // 4, s) for c, s in ((256, 56), (512, 28), (1024, 14), (2048, 7)))
PROJECTION = (
    BlockShape(64, 64, 56),
    BlockShape(256, 128, 56, 2),
    BlockShape(512, 256, 28, 2),
    BlockShape(1024, 512, 14, 2),
)
BLOCKS = {shape.name: shape for shape in (*IDENTITY, *PROJECTION)}


@dataclass(frozen=True)
class ConvShape:
    """A convolution: input [batch, channels, size, size], padded by half its square kernel."""

    channels: int
    outputs: int
    size: int
    kernel: int = 1
    stride: int = 1
    batch: int = 16

    @property
    def name(self) -> str:
        """What tables call it."""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        square = f"{self.kernel}x{self.kernel}"
        return f"{square}{stride}, {self.channels}-{self.outputs}, {self.size}x{self.size}"


def _stage(width: int, size: int) -> tuple[ConvShape, ...]:
    """Reduce, 3x3 and expand, and what a stage's first block has instead or besides."""
    inner = (
        ConvShape(4 * width, width, size),
        ConvShape(width, width, size, 3),
        ConvShape(width, 4 * width, size),
    )
    if width == 64:
        return (*inner, ConvShape(64, 64, size))
    shortcut = ConvShape(2 * width, 4 * width, 2 * size, 1, 2)
    return (*inner, ConvShape(2 * width, width, 2 * size), ConvShape(width, width, 2 * size, 3, 2),
            shortcut)  # fmt: skip


CONVOLUTIONS = {
    shape.name: shape
    for width, size in ((64, 56), (128, 28), (256, 14), (512, 7))
    for shape in _stage(width, size)
}
