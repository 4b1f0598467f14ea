// The plain residual add with its activation, and the activation's backward: no parameters, so a
// tensor is one long row wherever its mask rows leave no padding bits between them.
#include "cpu/gate.h"
#include "cpu/table.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

struct NoParams {};

template <class T, class Act>
struct AddAct {
  using A = Acc<T>;
  const T* x;
  const T* r;
  T* out;
  uint8_t* mask;
  int64_t cols, mask_stride;
  Act act;

  template <class Lanes>
  FASTRES_INLINE NoParams params(int64_t, Lanes) const {
    return {};
  }

  template <class Lanes>
  FASTRES_INLINE void apply(int64_t row, int64_t col, NoParams, Lanes lanes) const {
    const int64_t at = row * cols + col;
    const Pack<A> v = load(x + at, lanes) + load(r + at, lanes);
    if (mask) {
      store_bits(mask + row * mask_stride + col / 8, act.template bits<T>(v), lanes);
    }
    store(out + at, act.value(v), lanes);
  }
};

template <class T, Gating kGate>
struct ActBackward {
  GatedGradient<T, false, kGate> gradient;
  T* grad;

  using Params = typename GatedGradient<T, false, kGate>::Params;

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t, Lanes) const {
    return {};
  }

  template <class Lanes>
  FASTRES_INLINE void apply(int64_t row, int64_t col, const Params& p, Lanes lanes) const {
    const Pack<Acc<T>> unused = broadcast(Acc<T>(0));
    store(grad + row * gradient.cols + col, gradient.get(row, col, p, lanes, unused), lanes);
  }
};

Matrix longest_rows(const Problem& p, bool has_mask) {
  const bool padded = has_mask && p.cols() % 8 != 0;
  return padded ? Matrix{p.rows(), p.cols(), 1} : Matrix{1, p.numel(), 1};
}

template <class Op>
void map_flat(const Op& op, const Matrix& m, int threads, int64_t bytes) {
  parallel(threads, bytes, [&](Worker worker) {
    if (m.rows == 1) {
      map_row(op, 0, 0, worker.share(m.cols, 4 * kPack));
    } else {
      map_matrix<false>(op, m, worker);
    }
  });
}

}  // namespace

void add_act(const AddActArgs& a) {
  const Problem& p = a.problem;
  if (p.numel() == 0) {
    return;
  }
  with_dtype(p.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    with_act<Acc<T>>(a.act, [&](auto act) {
      const Matrix m = longest_rows(p, a.mask != nullptr);
      const AddAct<T, decltype(act)> op{(const T*)a.x, (const T*)a.r,       (T*)a.out, a.mask,
                                        m.cols,        ceil_div(m.cols, 8), act};
      map_flat(op, m, p.threads, p.numel() * int64_t(sizeof(T)) * 3);
    });
  });
}

void act_backward(const ActBackwardArgs& a) {
  const Problem& p = a.problem;
  if (p.numel() == 0) {
    return;
  }
  with_dtype(p.dtype, [&](auto dtype) {
    with_gating(a.gate, a.act, [&](auto gate) {
      constexpr Gating kGate = decltype(gate)::value;
      if constexpr (kGate != Gating::kReluOfY) {
        using T = typename decltype(dtype)::type;
        const Matrix m = longest_rows(p, kGate == Gating::kMask);
        ActBackward<T, kGate> op{gated_gradient<T, false, kGate>(a), (T*)a.grad};
        op.gradient.cols = m.cols;
        op.gradient.mask_stride = ceil_div(m.cols, 8);
        map_flat(op, m, p.threads, p.numel() * int64_t(sizeof(T)) * 2);
      }
    });
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
