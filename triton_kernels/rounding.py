"""Storing float32 arithmetic in a narrower dtype, alike on a GPU and in Triton's interpreter."""

import os

import triton
import triton.language as tl

#: The interpreter cuts bfloat16 off where a GPU rounds to nearest even.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def to_storage(v, dtype: tl.constexpr):
    """`v` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, nearest.to(tl.float32, bitcast=True), v)
    return v.to(dtype)
