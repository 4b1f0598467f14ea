// grad_y = a * g + b * y + c for one or both branches, and grad_residual = g.
#include "cpu/gate.h"
#include "cpu/scratch.h"
#include "cpu/table.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

// kReadY: false where running statistics were used, so that b = c = 0.
template <class T, bool kPerColumn, Gating kGate, bool kReadY, bool kDual>
struct ApplyGradient {
  using A = Acc<T>;
  static constexpr int kBranches = kDual ? 2 : 1;
  GatedGradient<T, kPerColumn, kGate> gradient;
  const T* y[2];
  const A* coefficients[2];  // [3, C] each
  T* grad_y[2];
  T* grad_residual;
  int64_t channels, cols;

  struct Params {
    typename GatedGradient<T, kPerColumn, kGate>::Params gate;
    Pack<A> a[kBranches], b[kBranches], c[kBranches];
  };

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t channel, Lanes lanes) const {
    Params p;
    p.gate = gradient.params(channel, lanes);
    FASTRES_UNROLL
    for (int i = 0; i < kBranches; ++i) {
      p.a[i] = parameter<kPerColumn>(coefficients[i], channel, lanes);
      if constexpr (kReadY) {
        p.b[i] = parameter<kPerColumn>(coefficients[i] + channels, channel, lanes);
        p.c[i] = parameter<kPerColumn>(coefficients[i] + 2 * channels, channel, lanes);
      }
    }
    return p;
  }

  template <int kBranch, class Lanes>
  FASTRES_INLINE void branch(int64_t at, const Params& p, Lanes lanes, const Pack<A>& g,
                             const Pack<A>& y_pack) const {
    if constexpr (kReadY) {
      const Pack<A> rest = fma(p.b[kBranch], y_pack, p.c[kBranch]);
      store(grad_y[kBranch] + at, fma(p.a[kBranch], g, rest), lanes);
    } else {
      store(grad_y[kBranch] + at, p.a[kBranch] * g, lanes);
    }
  }

  template <class Lanes>
  FASTRES_INLINE void apply(int64_t row, int64_t col, const Params& p, Lanes lanes) const {
    const int64_t at = row * cols + col;
    Pack<A> y1 = broadcast(A(0));
    if (kReadY || gradient.reads_y()) {
      y1 = load(y[0] + at, lanes);
    }
    const Pack<A> g = gradient.get(row, col, p.gate, lanes, y1);
    if (grad_y[0]) {
      branch<0>(at, p, lanes, g, y1);
    }
    if constexpr (kDual) {
      branch<1>(at, p, lanes, g, kReadY ? load(y[1] + at, lanes) : y1);
    }
    if (grad_residual) {
      store(grad_residual + at, g, lanes);
    }
  }
};

template <class T, bool kPerColumn, Gating kGate, bool kReadY, bool kDual>
void run(const BackwardApplyArgs& a) {
  using A = Acc<T>;
  const Problem& p = a.problem;
  const Matrix m = matrix_of(p);
  const Scratch<A> coefficients(6 * p.c);
  ApplyGradient<T, kPerColumn, kGate, kReadY, kDual> op{};
  op.gradient = gated_gradient<T, kPerColumn, kGate>(a);
  for (int b = 0; b < (kDual ? 2 : 1); ++b) {
    if (a.stats[b]) {
      fill_coefficients(a, b, coefficients.data() + 3 * b * p.c);
    }
    op.y[b] = (const T*)a.y[b];
    op.coefficients[b] = coefficients.data() + 3 * b * p.c;
    op.grad_y[b] = (T*)a.grad_y[b];
  }
  op.grad_residual = (T*)a.grad_residual;
  op.channels = p.c;
  op.cols = m.cols;
  const int64_t tensors = 2 + (kReadY ? 1 : 0) + (kDual ? 1 + (kReadY ? 1 : 0) : 0);
  parallel(p.threads, p.numel() * int64_t(sizeof(T)) * tensors,
           [&](Worker worker) { map_matrix<kPerColumn>(op, m, worker); });
}

}  // namespace

void backward_apply(const BackwardApplyArgs& a) {
  if (a.problem.numel() == 0) {
    return;
  }
  // y is read for the statistics' share of a gradient that somebody wants, and not otherwise.
  const bool dual = a.grad_y[1] != nullptr;
  const bool read_y = a.count != 0 && (a.grad_y[0] || dual);
  with_dtype(a.problem.dtype, [&](auto dtype) {
    with_flag(a.problem.per_column(), [&](auto per_column) {
      with_gating(a.gate, a.act, [&](auto gate) {
        using T = typename decltype(dtype)::type;
        constexpr bool kPerColumn = decltype(per_column)::value;
        constexpr Gating kGate = decltype(gate)::value;
        with_flag(read_y, [&](auto reads) {
          with_flag(dual, [&](auto two) {
            run<T, kPerColumn, kGate, decltype(reads)::value, decltype(two)::value>(a);
          });
        });
      });
    });
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
