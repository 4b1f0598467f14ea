// sum_g and sum_gx of every channel, for one or both branches of a block's end.
#include "cpu/gradient_sums.h"
#include "cpu/scratch.h"
#include "cpu/table.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

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
      sum_columns(op, cut.rows(block, m), {0, m.cols}, m.cols, sums.data(), stride);
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
  const Problem& p = a.problem;
  const auto op = gradient_sums<T, kPerColumn, kGate, kBranches>(a);
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
