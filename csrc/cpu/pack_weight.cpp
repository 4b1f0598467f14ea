// Weights in the order in which tiles read them: [blocks of columns, kh * kw, k of the sum,
// column].
#include "cpu/parallel.h"
#include "cpu/table.h"
#include "cpu/tile.h"

namespace fastres::cpu::FASTRES_ISA {

int64_t packed_size(const ConvShape& s, bool transposed) {
  const int64_t columns = transposed ? s.c : s.k, depth = transposed ? s.k : s.c;
  return ceil_div(columns, kTileColumns) * kTileColumns * s.taps() * depth;
}

void pack_weight(const PackWeightArgs& a) {
  const ConvShape& s = a.shape;
  const int64_t columns = a.transposed ? s.c : s.k, depth = a.transposed ? s.k : s.c;
  const int64_t column_stride = a.transposed ? a.stride_c : a.stride_k;
  const int64_t depth_stride = a.transposed ? a.stride_k : a.stride_c;
  const int64_t blocks = ceil_div(columns, kTileColumns);
  // A task is a block's tap, or a part of it: 16 steps of k, lines of the weight that lie together.
  constexpr int64_t kSteps = 16;
  const int64_t parts = ceil_div(depth, kSteps);
  const int64_t bytes = packed_size(s, a.transposed) * int64_t(sizeof(float));
  parallel(a.threads, bytes, [&](Worker worker) {
    const Range tasks = worker.share(blocks * parts);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t first = task / parts * kTileColumns, begin = task % parts * kSteps;
      const int64_t end = at_most(begin + kSteps, depth);
      const int64_t width = at_most(kTileColumns, columns - first);
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        const float* from =
            a.weight + tap / s.kw * a.stride_h + tap % s.kw * a.stride_w + first * column_stride;
        float* to = a.packed + (task / parts * s.taps() + tap) * depth * kTileColumns;
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
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
