// Mean and sum of squared deviations of every channel.
#include "cpu/block_stats.h"
#include "cpu/table.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

template <class T>
FASTRES_INLINE WelfordState row_stats(const T* y, int64_t cols) {
  using A = Acc<T>;
  const double count = double(cols);
  const auto sample = [&](int quarter) { return to_acc(y[cols * quarter / 4]); };
  const A guess = ((sample(0) + sample(1)) + (sample(2) + sample(3))) * A(0.25);
  A shift = usable_shift<A>(guess);
  double sums[2];
  for (int pass = 0; pass < 2; ++pass) {
    sum_row(ShiftedSums<T, false>{y, &shift, cols}, 0, 0, cols, sums);
    if (pass == 1 || !far_from_mean(count, sums[0], sums[1])) {
      break;
    }
    shift = usable_shift<A>(double(shift) + sums[0] / count);
  }
  return from_shifted_sums(count, double(shift), sums[0], sums[1]);
}

template <class T>
void stats_channels_last(const ChannelStatsArgs& a) {
  const Matrix m = matrix_of(a.problem);
  const Cut cut = cut_rows(m);
  const Scratch<double> partial(cut.blocks * 2 * m.cols);
  parallel(a.problem.threads, a.problem.numel() * int64_t(sizeof(T)), [&](Worker worker) {
    const BlockScratch<Acc<T>> scratch(m.cols);
    const Range blocks = worker.share(cut.blocks);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      block_stats((const T*)a.y, m.cols, cut.rows(block, m), {0, m.cols}, scratch,
                  partial.data() + block * 2 * m.cols);
    }
    worker.wait_for_all();
    merge_channels(a, partial.data(), cut.blocks, worker.share(m.cols, 8), [&](int64_t part) {
      const Range rows = cut.rows(part, m);
      return double(rows.end - rows.begin);
    });
  });
}

template <class T>
void stats_contiguous(const ChannelStatsArgs& a) {
  const Matrix m = matrix_of(a.problem);
  const int64_t c = a.problem.c;
  const Scratch<double> partial(2 * m.rows);
  parallel(a.problem.threads, a.problem.numel() * int64_t(sizeof(T)), [&](Worker worker) {
    const Range rows = worker.share(m.rows);
    double* means = partial.data() + rows.begin / c * 2 * c;
    int64_t channel = rows.begin % c;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const WelfordState s = row_stats((const T*)a.y + row * m.cols, m.cols);
      means[channel] = s.mean;
      means[c + channel] = s.m2;
      if (++channel == c) {
        channel = 0;
        means += 2 * c;
      }
    }
    worker.wait_for_all();
    merge_channels(a, partial.data(), a.problem.n, worker.share(c, 8),
                   [&](int64_t) { return double(m.cols); });
  });
}

}  // namespace

void channel_stats(const ChannelStatsArgs& a) {
  if (a.problem.count() == 0) {
    for (int64_t i = 0; a.prior_count == 0 && i < 2 * a.problem.c; ++i) {
      a.state[i] = 0;
    }
    return;
  }
  if (a.problem.c == 0) {
    return;
  }
  with_dtype(a.problem.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    if (a.problem.per_column()) {
      stats_channels_last<T>(a);
    } else {
      stats_contiguous<T>(a);
    }
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
