"""What the adapters of the convolution kernels share: sizes, precision, the choice of a tile."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels.registry import Request
from fastres.kernels.triton.launch import in_words, kernels, tuned
from fastres.kernels.triton.support import device_of, why_not
from fastres.kernels.types import Conv, dense

#: Fewer channels of a group than this leave the matrix units mostly idle: they take 16 at least.
_LEAST_GROUP = 16

#: Flags of what a kernel reads after its products, as large as their result.
_READ_AFTERWARDS = ("HAS_RESIDUAL", "RESIDUAL", "HAS_BELOW")

#: Pixels from which they are counted in 64 bits.
_FAR = 1 << 30


def why_not_convolved(request: Request) -> str | None:
    """Why the convolution kernels decline a request, or None."""
    if (reason := why_not(request)) is not None:
        return reason
    if not request.channels_last:
        return "it takes channels_last tensors"
    conv = request.conv
    if conv is not None and max(conv.dilation) > 1 and max(conv.stride) > 1:
        return "a dilation together with a stride has no kernel"
    if conv is not None and conv.groups > 1 and request.group_width < _LEAST_GROUP:
        return f"groups must have {_LEAST_GROUP} channels or more, got {request.group_width}"
    return None


class Problem(NamedTuple):
    """The sizes of a convolution, x [N, C, H, W] to y [N, K, P, Q]."""

    images: int
    height: int
    width: int
    out_height: int
    out_width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int]
    conv: Conv

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, conv: Conv) -> Problem:
        """That of a convolution of x with a weight."""
        n, c, h, w = x.shape
        k, _, kh, kw = weight.shape
        return cls(n, h, w, *conv.output_size((h, w), (kh, kw)), c, k, (kh, kw), conv)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' numbers."""
        return self[:7]

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        return _geometry(self.kernel, self.conv)

    @property
    def wide(self) -> bool:
        """Whether 32 bits might not count the pixels, up to twice as many with those of padding."""
        return self.images * max(self.height * self.width, self.out_height * self.out_width) >= _FAR

    @property
    def out_pixels(self) -> int:
        """Pixels of y."""
        return self.images * self.out_height * self.out_width

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Of y."""
        return self.images, self.out_channels, self.out_height, self.out_width


@lru_cache(maxsize=256)
def _geometry(kernel: tuple[int, int], conv: Conv) -> dict[str, int]:
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, conv.stride, conv.padding, conv.dilation
    return {
        "TAPS_H": kh, "TAPS_W": kw, "STRIDE_H": sh, "STRIDE_W": sw, "PAD_H": ph, "PAD_W": pw,
        "DILATION_H": dh, "DILATION_W": dw, "GROUPS": conv.groups,
    }  # fmt: skip


@lru_cache(maxsize=1024)
def _tiles(described: bool, specialised: bool, *problem: int | bool) -> list[Any]:
    """Candidates; by tensor descriptors, and with specialised warps, after the plain ones."""
    plain = kernels().conv.tiles(*problem)
    copied = [tile._replace(descriptors=True) for tile in plain] if described else []
    if specialised:
        copied += [tile._replace(specialised=True) for tile in copied]
    return [*plain, *copied]


def choose_tile(
    kernel: Any,
    p: Problem,
    shape: tuple[int, int, int],
    flags: dict[str, Any],
    run: Callable[[Any], object],
    like: Tensor,
    described: bool = False,
    splits: bool = False,
) -> Any:
    """The tile for a product of `shape` (rows, columns, depth).

    `described` adds the same tiles by tensor descriptors: to be measured, never taken unmeasured.
    With `splits` the kernel fills the device by splitting its sum, whatever the tile.
    """
    device = device_of(like)
    processors = 1 if splits else device.processors
    formed = not flags.get("PENDING", False)
    alone = not any(flags.get(name) for name in _READ_AFTERWARDS)
    # Who has the copy engine multiplies by warpgroups.
    how = (formed, alone, device.copy_engine)
    problem = (*shape, like.element_size(), processors, device.shared_bytes, *how)
    candidates = _tiles(described, device.specialises, *problem)
    # Not by HAS_STATE: a recomputed output must have the bits of the first one.
    by = [in_words(value) for name, value in flags.items() if name != "HAS_STATE"]
    sizes = (*p.sizes, *p.constants.values(), str(like.dtype), described, *by)
    name, module = kernel.fn.__name__, kernel.fn.__module__
    return tuned(name, module, sizes, candidates, run, like.device)


def channels_innermost(weight: Tensor) -> Tensor:
    """[K, C, kh, kw] with its channels innermost, as the kernels read it."""
    return dense(weight, torch.channels_last)


def empty(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Memory for an activation, channels_last, with the dtype and device of `like`."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
