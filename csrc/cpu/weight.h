// A convolution's weight as the tiles read it: [blocks of columns, tap, k of the sum, column].
#pragma once

#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace fastres::cpu::FASTRES_ISA {

#if defined(__AVX512F__)
// Sixteen rows of sixteen four-byte values, `step` bytes apart, become columns.
FASTRES_INLINE void transpose_block(const void* from, int64_t step, void* to, int64_t to_step) {
  __m512i rows[16];
  FASTRES_UNROLL
  for (int i = 0; i < 16; ++i) {
    rows[i] = _mm512_loadu_si512((const char*)from + i * step);
  }
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  FASTRES_UNROLL
  for (int half = 8; half > 0; half /= 2) {
    // Lanes of the second operand are counted from 16 on.
    const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(half));
    const __m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - half));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(half));
    FASTRES_UNROLL
    for (int i = 0; i < 16; ++i) {
      if (!(i & half)) {
        const __m512i a = rows[i], b = rows[i + half];
        rows[i] = _mm512_permutex2var_epi32(a, low, b);
        rows[i + half] = _mm512_permutex2var_epi32(a, high, b);
      }
    }
  }
  FASTRES_UNROLL
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_si512((char*)to + i * to_step, rows[i]);
  }
}
#endif

// How a block of columns is read off a weight that lies in any order. A step is a tap's k, or two
// of them.
template <class T = float>
struct WeightView {
  using E = Operand<T>;
  const T* weight;
  int64_t column_stride, depth_stride, stride_h, stride_w;
  int64_t columns, depth, kw;

  WeightView(const ConvWeight& w, const ConvShape& s, bool transposed)
      : weight((const T*)w.weight),
        column_stride(transposed ? w.stride_c : w.stride_k),
        depth_stride(transposed ? w.stride_k : w.stride_c),
        stride_h(w.stride_h),
        stride_w(w.stride_w),
        columns(transposed ? s.c : s.k),
        depth(transposed ? s.k : s.c),
        kw(s.kw) {}

  // Steps [begin, end) of a whole tile's columns from `first` on, zero where there are none.
  void pack(int64_t first, Range steps, E* to) const {
    const int64_t width = at_most(kTileColumns, columns - first), each = steps_of<E>(depth);
    for (int64_t step = steps.begin; step < steps.end;) {
      const int64_t tap = step / each, k = step % each * kPerStep<E>;
      const int64_t count = at_most(each - step % each, steps.end - step);
      const T* from = weight + tap / kw * stride_h + tap % kw * stride_w + k * depth_stride +
                      first * column_stride;
      pack_tap(from, width, count, depth - k, to);
      step += count;
      to += count * kTileColumns;
    }
  }

 private:
  static constexpr bool kAsItLies = std::is_same_v<T, Formed<E>>;

  // A few lines of the weight at a time: what they hold of other steps is still in L1 then. `left`
  // values of k are there.
  void pack_tap(const T* from, int64_t width, int64_t count, int64_t left, E* to) const {
    constexpr int64_t kSteps = 16;
    for (int64_t begin = 0; begin < count; begin += kSteps) {
      const int64_t end = at_most(begin + kSteps, count);
      if (column_stride == 1) {
        for (int64_t k = begin; k < end; ++k) {
          pack_line(from + k * kPerStep<E> * depth_stride, width, left - k * kPerStep<E>,
                    to + k * kTileColumns);
        }
      } else {
        int64_t col = 0;
#if defined(__AVX512F__)
        // What lies together in memory stays so in a step.
        const bool whole = end == begin + kSteps && end * kPerStep<E> <= left;
        for (; depth_stride == 1 && kAsItLies && whole && col + kSteps <= width; col += kSteps) {
          transpose_block(from + begin * kPerStep<E> + col * column_stride,
                          column_stride * int64_t(sizeof(T)), to + begin * kTileColumns + col,
                          kTileColumns * int64_t(sizeof(E)));
        }
#endif
        for (; col < width; ++col) {
          for (int64_t k = begin; k < end; ++k) {
            const T* p = from + k * kPerStep<E> * depth_stride + col * column_stride;
            to[k * kTileColumns + col] = step(p, left - k * kPerStep<E>, (E*)nullptr);
          }
        }
      }
      for (int64_t k = begin; k < end && width < kTileColumns; ++k) {
        memset((void*)(to + k * kTileColumns + width), 0, sizeof(E) * size_t(kTileColumns - width));
      }
    }
  }

  void pack_line(const T* from, int64_t width, int64_t left, E* to) const {
    if constexpr (std::is_same_v<T, E>) {
      memcpy(to, from, sizeof(T) * size_t(width));
    } else {
      for (int64_t col = 0; col < width; ++col) {
        to[col] = step(from + col, left, (E*)nullptr);
      }
    }
  }

  FASTRES_INLINE float step(const T* p, int64_t, float*) const { return to_acc(*p); }
  FASTRES_INLINE Pair step(const T* p, int64_t left, Pair*) const {
    return {*p, left > 1 ? p[depth_stride] : T{}};
  }
};

}  // namespace fastres::cpu::FASTRES_ISA
