// Mean and sum of squared deviations of a block of rows, and how those of several blocks join.
#pragma once

#include "cpu/matrix.h"
#include "cpu/scratch.h"
#include "fastres/welford.h"

namespace fastres::cpu::FASTRES_ISA {

// Sums of d = y - shift and of d * d, shift being any value near the channel's mean.
template <class T, bool kPerColumn>
struct ShiftedSums {
  using Arithmetic = Acc<T>;
  using A = Arithmetic;
  static constexpr int kSums = 2;
  const T* y;
  const A* shift;
  int64_t cols;

  struct Params {
    Pack<A> shift;
  };

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t channel, Lanes lanes) const {
    return {parameter<kPerColumn>(shift, channel, lanes)};
  }

  FASTRES_INLINE void prefetch(int64_t at) const { prefetch_packs(y + at); }

  template <class Lanes>
  FASTRES_INLINE void add(int64_t row, int64_t col, const Params& p, Lanes lanes,
                          Pack<A> (&acc)[2]) const {
    const Pack<A> d = existing(lanes, load(y + row * cols + col, lanes) - p.shift);
    acc[0] = acc[0] + d;
    acc[1] = fma(d, d, acc[1]);
  }
};

// A shift that is far from the mean, as seen from the spread about the mean, would cost digits in
// sum_dd - sum_d^2 / count. NaN and infinity never ask for another pass.
FASTRES_INLINE bool far_from_mean(double count, double sum_d, double sum_dd) {
  const double offset = sum_d * (sum_d / count);
  return offset > 4 * (sum_dd - offset);
}

template <class A>
FASTRES_INLINE A usable_shift(double value) {
  const A rounded = A(value);
  return rounded - rounded == 0 ? rounded : A(0);
}

// First guess of the columns' shifts: the mean of a few rows spread over the block.
template <class T>
FASTRES_INLINE void guess_shifts(const T* y, int64_t cols, Range rows, Range columns,
                                 Acc<T>* shift) {
  const int64_t samples = at_most(8, rows.end - rows.begin);
  const int64_t stride = (rows.end - rows.begin) / samples;
  const auto visit = [&](int64_t col, auto lanes) {
    Pack<Acc<T>> sum = broadcast(Acc<T>(0));
    for (int64_t i = 0; i < samples; ++i) {
      sum = sum + load(y + (rows.begin + i * stride) * cols + col, lanes);
    }
    sum = sum * broadcast(Acc<T>(1) / Acc<T>(samples));
    store(shift + col - columns.begin, sum, Full{});
  };
  int64_t col = columns.begin;
  for (; col + kPack <= columns.end; col += kPack) {
    visit(col, Full{});
  }
  if (col < columns.end) {
    visit(col, Part{int(columns.end - col)});
  }
  for (int64_t i = 0; i < columns.end - columns.begin; ++i) {
    shift[i] = usable_shift<Acc<T>>(shift[i]);
  }
}

// What a worker needs for one block, rows padded to whole packs.
template <class A>
struct BlockScratch {
  explicit BlockScratch(int64_t cols)
      : stride(round_up(cols, kPack)), shift(stride), sums(2 * stride) {}
  int64_t stride;
  Scratch<A> shift;
  Scratch<double> sums;
};

// Of some of the columns: means to partial[columns], sums of squared deviations to
// partial[cols + columns].
template <class T>
void block_stats(const T* y, int64_t cols, Range rows, Range columns,
                 const BlockScratch<Acc<T>>& scratch, double* partial, bool cached = false) {
  using A = Acc<T>;
  A* shift = scratch.shift.data();
  const double* sum_d = scratch.sums.data();
  const double* sum_dd = sum_d + scratch.stride;
  const double count = double(rows.end - rows.begin);
  const int64_t width = columns.end - columns.begin;
  guess_shifts(y, cols, rows, columns, shift);
  for (int pass = 0; pass < 2; ++pass) {
    sum_columns(ShiftedSums<T, true>{y, shift - columns.begin, cols}, rows, columns, cols,
                scratch.sums.data(), scratch.stride, cached || pass > 0);
    int far = 0;
    for (int64_t i = 0; i < width; ++i) {
      far |= far_from_mean(count, sum_d[i], sum_dd[i]);
    }
    if (!far || pass == 1) {
      break;
    }
    for (int64_t i = 0; i < width; ++i) {
      shift[i] = usable_shift<A>(double(shift[i]) + sum_d[i] / count);
    }
  }
  partial += columns.begin;
  for (int64_t i = 0; i < width; ++i) {
    const WelfordState s = from_shifted_sums(count, double(shift[i]), sum_d[i], sum_dd[i]);
    partial[i] = s.mean;
    partial[cols + i] = s.m2;
  }
}

// Joins `parts` partial results [parts, 2, C] in their order, then with the prior state.
template <class CountOf>
void merge_channels(const ChannelStatsArgs& a, const double* partial, int64_t parts, Range channels,
                    const CountOf& count_of) {
  const int64_t c = a.problem.c;
  double mean[kChannelsAtOnce], m2[kChannelsAtOnce];
  for (int64_t begin = channels.begin; begin < channels.end; begin += kChannelsAtOnce) {
    const int64_t width = at_most(kChannelsAtOnce, channels.end - begin);
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const double* p = partial + part * 2 * c + begin;
      const double count = count_of(part);
      for (int64_t i = 0; i < width; ++i) {
        const WelfordState s = merge({total, mean[i], m2[i]}, {count, p[i], p[c + i]});
        mean[i] = s.mean;
        m2[i] = s.m2;
      }
      total += count;
    }
    double* state = a.state + begin;
    for (int64_t i = 0; i < width; ++i) {
      const WelfordState prior{double(a.prior_count), state[i], state[c + i]};
      const WelfordState s = merge(prior, {total, mean[i], m2[i]});
      state[i] = s.mean;
      state[c + i] = s.m2;
    }
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
