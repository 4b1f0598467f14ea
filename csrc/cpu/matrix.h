// Walking an activation seen as a dense matrix: elementwise maps and per-channel sums.
//
// An operation `Op` supplies
//   Params params(int64_t channel, lanes)        its per-channel values, per column or broadcast
//   void apply(row, col, params, lanes)          one pack of an elementwise map, or
//   void add(row, col, params, lanes, acc)       one pack's terms added to acc[Op::kSums]
// and is the same code for both layouts; these loops decide in which order it is called.
#pragma once

#include "cpu/parallel.h"

namespace fastres::cpu::FASTRES_ISA {

struct Matrix {
  int64_t rows, cols, channels;
};

inline Matrix matrix_of(const Problem& p) { return {p.rows(), p.cols(), p.c}; }

// A channel's parameter for every lane: the columns' own values, or the row's value repeated.
template <bool kPerColumn, class A, class Lanes>
FASTRES_INLINE Pack<A> parameter(const A* values, int64_t index, Lanes lanes) {
  if constexpr (kPerColumn) {
    return load(values + index, lanes);
  } else {
    return broadcast(values[index]);
  }
}

// ---- elementwise ----

// Row after row, parameters reloaded from L1 for each: keeping them in registers over several rows
// would make several streams of the tensors, which halves what comes from memory.
template <class Op>
FASTRES_INLINE void map_row_per_column(const Op& op, int64_t row, int64_t cols) {
  int64_t col = 0;
  for (; col + kPack <= cols; col += kPack) {
    op.apply(row, col, op.params(col, Full{}), Full{});
  }
  if (col < cols) {
    const Part rest{int(cols - col)};
    op.apply(row, col, op.params(col, rest), rest);
  }
}

template <class Op>
FASTRES_INLINE void map_row(const Op& op, int64_t row, int64_t channel, Range cols) {
  const auto params = op.params(channel, Full{});
  int64_t col = cols.begin;
  for (; col + 4 * kPack <= cols.end; col += 4 * kPack) {
    FASTRES_UNROLL_ROWS
    for (int i = 0; i < 4; ++i) {
      op.apply(row, col + i * kPack, params, Full{});
    }
  }
  for (; col + kPack <= cols.end; col += kPack) {
    op.apply(row, col, params, Full{});
  }
  if (col < cols.end) {
    op.apply(row, col, params, Part{int(cols.end - col)});
  }
}

template <bool kPerColumn, class Op>
void map_matrix(const Op& op, const Matrix& m, Worker worker) {
  const Range rows = worker.share(m.rows);
  int64_t channel = rows.begin % m.channels;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if constexpr (kPerColumn) {
      map_row_per_column(op, row, m.cols);
    } else {
      map_row(op, row, channel, {0, m.cols});
      channel = channel + 1 == m.channels ? 0 : channel + 1;
    }
  }
}

// ---- sums ----

// Float terms are summed in registers over this many packs, then join sums kept in double.
inline constexpr int kTermsPerFloatSum = 8;
// In elements: 64 KB of floats, some microseconds of work, and small beside L2.
inline constexpr int64_t kPrefetchAhead = 16 * 1024;

// Terms of kRows rows added to the columns' sums, sums[k * stride + col - columns.begin]; the sums'
// rows are padded to whole packs. Reading several rows side by side is too much for the hardware's
// prefetcher, so the lines of the rows `ahead` elements further on are asked for, in the order of
// addresses.
template <int kRows, class Op>
FASTRES_INLINE void add_rows(const Op& op, int64_t row, Range columns, int64_t cols, int64_t ahead,
                             double* sums, int64_t stride) {
  using A = typename Op::Arithmetic;
  const auto visit = [&](int64_t col, auto lanes) {
    if (kRows == kTermsPerFloatSum && ahead) {
      op.prefetch(row * cols + col * kRows + ahead);
    }
    const auto params = op.params(col, lanes);
    Pack<A> acc[Op::kSums];
    FASTRES_UNROLL
    for (int k = 0; k < Op::kSums; ++k) {
      acc[k] = broadcast(A(0));
    }
    FASTRES_UNROLL_ROWS
    for (int i = 0; i < kRows; ++i) {
      op.add(row + i, col, params, lanes, acc);
    }
    FASTRES_UNROLL
    for (int k = 0; k < Op::kSums; ++k) {
      double* sum = sums + k * stride + col - columns.begin;
      store(sum, load(sum, Full{}) + widen(acc[k]), Full{});
    }
  };
  int64_t col = columns.begin;
  for (; col + kPack <= columns.end; col += kPack) {
    visit(col, Full{});
  }
  if (col < columns.end) {
    visit(col, Part{int(columns.end - col)});
  }
}

// Asks for the memory behind the next kTermsPerFloatSum packs of a tensor, to L2.
template <class T>
FASTRES_INLINE void prefetch_packs(const T* p) {
  FASTRES_UNROLL
  for (int offset = 0; offset < int(sizeof(T)) * kTermsPerFloatSum * kPack; offset += 64) {
    __builtin_prefetch((const char*)p + offset, 0, 2);
  }
}

// Sums of some of the columns over a range of rows; `cached` rows need not be asked for.
template <class Op>
FASTRES_INLINE void sum_columns(const Op& op, Range rows, Range columns, int64_t cols, double* sums,
                                int64_t stride, bool cached = false) {
  for (int64_t i = 0; i < Op::kSums * stride; ++i) {
    sums[i] = 0;
  }
  constexpr int kRows = kTermsPerFloatSum;
  // Far enough ahead for memory to answer, in whole groups of rows.
  const int64_t ahead = cached ? 0 : kRows * cols * ceil_div(kPrefetchAhead, kRows * cols);
  int64_t row = rows.begin;
  for (; row + kRows <= rows.end; row += kRows) {
    add_rows<kRows>(op, row, columns, cols, ahead, sums, stride);
  }
  for (; row < rows.end; ++row) {
    add_rows<1>(op, row, columns, cols, ahead, sums, stride);
  }
}

template <class Op>
FASTRES_INLINE void sum_row(const Op& op, int64_t row, int64_t channel, int64_t cols,
                            double* sums) {
  using A = typename Op::Arithmetic;
  const auto params = op.params(channel, Full{});
  Pack<double> wide[Op::kSums];
  FASTRES_UNROLL
  for (int k = 0; k < Op::kSums; ++k) {
    wide[k] = broadcast(0.0);
  }
  for (int64_t begin = 0; begin < cols; begin += kTermsPerFloatSum * kPack) {
    const int64_t end = at_most(cols, begin + kTermsPerFloatSum * kPack);
    Pack<A> acc[Op::kSums];
    FASTRES_UNROLL
    for (int k = 0; k < Op::kSums; ++k) {
      acc[k] = broadcast(A(0));
    }
    int64_t col = begin;
    for (; col + kPack <= end; col += kPack) {
      op.add(row, col, params, Full{}, acc);
    }
    if (col < end) {
      op.add(row, col, params, Part{int(end - col)}, acc);
    }
    FASTRES_UNROLL
    for (int k = 0; k < Op::kSums; ++k) {
      wide[k] = wide[k] + widen(acc[k]);
    }
  }
  for (int k = 0; k < Op::kSums; ++k) {
    sums[k] = horizontal_sum(wide[k]);
  }
}

// How the rows of a matrix are cut for columns' sums. It depends on the shape alone, never on the
// number of threads, and the parts are joined in their own order: the same bits for any team.
struct Cut {
  int64_t blocks, rows_per_block;

  FASTRES_INLINE Range rows(int64_t block, const Matrix& m) const {
    const int64_t begin = block * rows_per_block;
    return {begin, at_most(begin + rows_per_block, m.rows)};
  }
};

// Blocks of about 128 Ki elements; at least 56 rows, so that a block's sums stay small beside what
// they sum up; at most 256 blocks, so that all of them together are small too.
inline Cut cut_rows(const Matrix& m) {
  int64_t rows = at_least(56, 128 * 1024 / at_least(1, m.cols));
  rows = round_up(at_least(rows, ceil_div(m.rows, 256)), kTermsPerFloatSum);
  return {ceil_div(m.rows, rows), rows};
}

// Partial results are joined for so many channels at a time.
inline constexpr int64_t kChannelsAtOnce = 64;

}  // namespace fastres::cpu::FASTRES_ISA
