"""Arithmetic that several kernels share, alike on a GPU and in Triton's interpreter."""

import os

import triton
import triton.language as tl

#: Rows of a `stats` tensor [5, C].
MEAN = tl.constexpr(0)
INVSTD = tl.constexpr(2)
SCALE = tl.constexpr(3)
SHIFT = tl.constexpr(4)

#: How a backward kernel knows where the activation's gate is open.
GATE_NONE = tl.constexpr(0)
GATE_MASK = tl.constexpr(1)
GATE_AFFINE = tl.constexpr(2)
GATE_OUT = tl.constexpr(3)

#: The interpreter cuts bfloat16 off where a GPU rounds to nearest even, and multiplies bfloat16
#: matrices as if their bits were integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def to_storage(v, dtype: tl.constexpr):
    """`v` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, nearest.to(tl.float32, bitcast=True), v)
    return v.to(dtype)


@triton.jit
def total(b_x, AXIS: tl.constexpr):
    """Sum of [A, B] along one axis, which stays with size 1.

    A GPU adds in a tree. The interpreter does so along memory only, and one after the other across
    it: there the tile is turned first.
    """
    if INTERPRETED and AXIS == 0:
        rows: tl.constexpr = b_x.shape[0]
        columns: tl.constexpr = b_x.shape[1]
        b_turned = tl.reshape(tl.reshape(tl.trans(b_x), [rows * columns]), [columns, rows])
        return tl.sum(b_turned, axis=1)[None, :]
    else:
        return tl.sum(b_x, axis=AXIS, keep_dims=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def affine(v, scale, shift):
    """scale*v + shift, rounded once, so that backward recomputes forward's very sign."""
    return tl.fma(v, scale, shift)


@triton.jit
def bn_gradient(g, y, mean, scale, slope, mean_g):
    """grad_y = A*g + B*y + C with the means taken out first; slope = B = -scale*invstd*sum_gx/M.

    At mean 1e4 and std 1, B*y + C would cancel all but the last digits of float32.
    """
    return (g - mean_g) * scale + (y - mean) * slope
