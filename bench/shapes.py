"""The blocks that the CPU benchmark times: ResNet-50's, batch 16."""

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
