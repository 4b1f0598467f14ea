// A convolution's weight as the tiles read it: [blocks of columns, tap, k of the sum, column].
#pragma once

#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace fastres::cpu::FASTRES_ISA {

// How a block of columns is read off a weight that lies in any order. A step is a tap's k.
struct WeightView {
  const float* weight;
  int64_t column_stride, depth_stride, stride_h, stride_w;
  int64_t columns, depth, kw;

  WeightView(const ConvWeight& w, const ConvShape& s, bool transposed)
      : weight(w.weight),
        column_stride(transposed ? w.stride_c : w.stride_k),
        depth_stride(transposed ? w.stride_k : w.stride_c),
        stride_h(w.stride_h),
        stride_w(w.stride_w),
        columns(transposed ? s.c : s.k),
        depth(transposed ? s.k : s.c),
        kw(s.kw) {}

  // Steps [begin, end) of a whole tile's columns from `first` on, zero where there are none.
  void pack(int64_t first, Range steps, float* to) const {
    const int64_t width = at_most(kTileColumns, columns - first);
    for (int64_t step = steps.begin; step < steps.end;) {
      const int64_t tap = step / depth, k = step % depth;
      const int64_t count = at_most(depth - k, steps.end - step);
      const float* from = weight + tap / kw * stride_h + tap % kw * stride_w + k * depth_stride +
                          first * column_stride;
      pack_tap(from, width, count, to);
      step += count;
      to += count * kTileColumns;
    }
  }

 private:
  // A few lines of the weight at a time: what they hold of other steps is still in L1 then.
  void pack_tap(const float* from, int64_t width, int64_t count, float* to) const {
    constexpr int64_t kSteps = 16;
    for (int64_t begin = 0; begin < count; begin += kSteps) {
      const int64_t end = at_most(begin + kSteps, count);
      if (column_stride == 1) {
        for (int64_t k = begin; k < end; ++k) {
          memcpy(to + k * kTileColumns, from + k * depth_stride, sizeof(float) * size_t(width));
        }
      } else {
        for (int64_t col = 0; col < width; ++col) {
          for (int64_t k = begin; k < end; ++k) {
            to[k * kTileColumns + col] = from[k * depth_stride + col * column_stride];
          }
        }
      }
      for (int64_t k = begin; k < end && width < kTileColumns; ++k) {
        memset(to + k * kTileColumns + width, 0, sizeof(float) * size_t(kTileColumns - width));
      }
    }
  }
};

}  // namespace fastres::cpu::FASTRES_ISA
