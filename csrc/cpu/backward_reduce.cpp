// sum_g and sum_gx of every channel, for one or both branches of a block's end.
#include "cpu/gate.h"
#include "cpu/scratch.h"
#include "cpu/table.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

// kBranches counts the branches whose sum_gx is wanted.
template <class T, bool kPerColumn, Gating kGate, int kBranches>
struct GradientSums {
  using Arithmetic = Acc<T>;
  using A = Arithmetic;
  static constexpr int kSums = 1 + kBranches;
  GatedGradient<T, kPerColumn, kGate> gradient;
  const T* y[2];
  const A* mean[2];
  int64_t cols;

  struct Params {
    typename GatedGradient<T, kPerColumn, kGate>::Params gate;
    Pack<A> mean[kBranches > 0 ? kBranches : 1];
  };

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t channel, Lanes lanes) const {
    Params p;
    p.gate = gradient.params(channel, lanes);
    FASTRES_UNROLL
    for (int b = 0; b < kBranches; ++b) {
      p.mean[b] = parameter<kPerColumn>(mean[b], channel, lanes);
    }
    return p;
  }

  FASTRES_INLINE void prefetch(int64_t at) const {
    gradient.prefetch(at);
    FASTRES_UNROLL
    for (int b = 0; b < kBranches; ++b) {
      prefetch_packs(y[b] + at);
    }
  }

  // Lanes that do not exist hold g = 0; their y - mean must be zeroed too, or an infinite mean
  // would turn them into NaN.
  template <class Lanes>
  FASTRES_INLINE void add(int64_t row, int64_t col, const Params& p, Lanes lanes,
                          Pack<A> (&acc)[kSums]) const {
    const int64_t at = row * cols + col;
    Pack<A> y1 = broadcast(A(0));
    if constexpr (kBranches > 0) {
      y1 = load(y[0] + at, lanes);
    }
    const Pack<A> g = gradient.get(row, col, p.gate, lanes, y1);
    acc[0] = acc[0] + g;
    if constexpr (kBranches > 0) {
      acc[1] = fma(g, existing(lanes, y1 - p.mean[0]), acc[1]);
    }
    if constexpr (kBranches > 1) {
      acc[2] = fma(g, existing(lanes, load(y[1] + at, lanes) - p.mean[1]), acc[2]);
    }
  }
};

// Joins partial sums [parts, kSums, C] in their order and scales them by invstd.
template <class A, int kSums>
void join_sums(const BackwardReduceArgs& a, const double* partial, int64_t parts, Range channels) {
  const int64_t c = a.problem.c;
  for (int64_t begin = channels.begin; begin < channels.end; begin += kChannelsAtOnce) {
    const int64_t width = at_most(kChannelsAtOnce, channels.end - begin);
    for (int k = 0; k < kSums; ++k) {
      double sum[kChannelsAtOnce] = {};
      for (int64_t part = 0; part < parts; ++part) {
        const double* p = partial + (part * kSums + k) * c + begin;
        for (int64_t i = 0; i < width; ++i) {
          sum[i] += p[i];
        }
      }
      const A* invstd = k == 0 ? nullptr : (const A*)a.stats[k - 1] + kInvstd * c + begin;
      double* total = a.sums + k * c + begin;
      for (int64_t i = 0; i < width; ++i) {
        const double scaled = invstd ? sum[i] * double(invstd[i]) : sum[i];
        total[i] = a.accumulate ? total[i] + scaled : scaled;
      }
    }
  }
}

template <class Op>
void reduce_channels_last(const Op& op, const BackwardReduceArgs& a, int64_t bytes) {
  using A = typename Op::Arithmetic;
  const Matrix m = matrix_of(a.problem);
  const Cut cut = cut_rows(m);
  const int64_t stride = round_up(m.cols, kPack);
  const Scratch<double> partial(cut.blocks * Op::kSums * m.cols);
  parallel(a.problem.threads, bytes, [&](Worker worker) {
    const Scratch<double> sums(Op::kSums * stride);
    const Range blocks = worker.share(cut.blocks);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      sum_columns(op, cut.rows(block, m), m.cols, sums.data(), stride);
      for (int k = 0; k < Op::kSums; ++k) {
        memcpy(partial.data() + (block * Op::kSums + k) * m.cols, sums.data() + k * stride,
               sizeof(double) * size_t(m.cols));
      }
    }
    worker.wait_for_all();
    join_sums<A, Op::kSums>(a, partial.data(), cut.blocks, worker.share(m.cols, 8));
  });
}

template <class Op>
void reduce_contiguous(const Op& op, const BackwardReduceArgs& a, int64_t bytes) {
  using A = typename Op::Arithmetic;
  const Matrix m = matrix_of(a.problem);
  const int64_t c = a.problem.c;
  const Scratch<double> partial(Op::kSums * m.rows);
  parallel(a.problem.threads, bytes, [&](Worker worker) {
    double sums[Op::kSums];
    const Range rows = worker.share(m.rows);
    double* image = partial.data() + rows.begin / c * Op::kSums * c;
    int64_t channel = rows.begin % c;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      sum_row(op, row, channel, m.cols, sums);
      for (int k = 0; k < Op::kSums; ++k) {
        image[k * c + channel] = sums[k];
      }
      if (++channel == c) {
        channel = 0;
        image += Op::kSums * c;
      }
    }
    worker.wait_for_all();
    join_sums<A, Op::kSums>(a, partial.data(), a.problem.n, worker.share(c, 8));
  });
}

template <class T, bool kPerColumn, Gating kGate, int kBranches>
void run(const BackwardReduceArgs& a) {
  using A = Acc<T>;
  const Problem& p = a.problem;
  GradientSums<T, kPerColumn, kGate, kBranches> op{};
  op.gradient = gated_gradient<T, kPerColumn, kGate>(a);
  op.cols = p.cols();
  for (int b = 0; b < kBranches; ++b) {
    op.y[b] = (const T*)a.y[b];
    op.mean[b] = (const A*)a.stats[b] + kMean * p.c;
  }
  const int64_t bytes = p.numel() * int64_t(sizeof(T)) * (1 + kBranches);
  if constexpr (kPerColumn) {
    reduce_channels_last(op, a, bytes);
  } else {
    reduce_contiguous(op, a, bytes);
  }
}

}  // namespace

void backward_reduce(const BackwardReduceArgs& a) {
  if (a.problem.numel() == 0) {
    // An empty tensor's address is null, so here the statistics tell which rows are wanted.
    const int branches = a.stats[1] ? 2 : a.stats[0] ? 1 : 0;
    for (int64_t i = 0; !a.accumulate && i < (1 + branches) * a.problem.c; ++i) {
      a.sums[i] = 0;
    }
    return;
  }
  const int branches = a.y[1] ? 2 : a.y[0] ? 1 : 0;
  with_dtype(a.problem.dtype, [&](auto dtype) {
    with_flag(a.problem.per_column(), [&](auto per_column) {
      with_gating(a.gate, a.act, [&](auto gate) {
        using T = typename decltype(dtype)::type;
        constexpr bool kPerColumn = decltype(per_column)::value;
        constexpr Gating kGate = decltype(gate)::value;
        if (branches == 2) {
          run<T, kPerColumn, kGate, 2>(a);
        } else if (branches == 1) {
          run<T, kPerColumn, kGate, 1>(a);
        } else if constexpr (kGate != Gating::kReluOfY) {
          run<T, kPerColumn, kGate, 0>(a);
        }
      });
    });
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
