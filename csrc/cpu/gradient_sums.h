// sum_g and sum_gx of every channel: the operation, and how its partial results join.
#pragma once

#include "cpu/gate.h"

namespace fastres::cpu::FASTRES_ISA {

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

template <class T, bool kPerColumn, Gating kGate, int kBranches>
GradientSums<T, kPerColumn, kGate, kBranches> gradient_sums(const BackwardReduceArgs& a) {
  using A = Acc<T>;
  const Problem& p = a.problem;
  GradientSums<T, kPerColumn, kGate, kBranches> op{};
  op.gradient = gated_gradient<T, kPerColumn, kGate>(a);
  op.cols = p.cols();
  for (int b = 0; b < kBranches; ++b) {
    op.y[b] = (const T*)a.y[b];
    op.mean[b] = (const A*)a.stats[b] + kMean * p.c;
  }
  return op;
}

}  // namespace fastres::cpu::FASTRES_ISA
