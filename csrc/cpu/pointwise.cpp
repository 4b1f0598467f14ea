// The plain residual add with its activation, and the activation's backward: no parameters, so a
// tensor is one long row wherever its mask rows leave no padding bits between them.
#include "cpu/gate.h"
#include "cpu/table.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

struct NoParams {};

template <class T, bool kRelu>
struct AddAct {
  using A = Acc<T>;
  const T* x;
  const T* r;
  T* out;
  uint8_t* mask;
  int64_t cols, mask_stride;

  template <class Lanes>
  FASTRES_INLINE NoParams params(int64_t, Lanes) const {
    return {};
  }

  template <class Lanes>
  FASTRES_INLINE void apply(int64_t row, int64_t col, NoParams, Lanes lanes) const {
    const int64_t at = row * cols + col;
    Pack<A> v = load(x + at, lanes) + load(r + at, lanes);
    if (mask) {
      uint32_t bits = 0xffffu;
      if constexpr (kRelu) {
        bits = bits_of(not_le(v, broadcast(RoundsToZero<T>::bound())));
      }
      store_bits(mask + row * mask_stride + col / 8, bits, lanes);
    }
    if constexpr (kRelu) {
      v = relu(v);
    }
    store(out + at, v, lanes);
  }
};

template <class T, fastres::Gate kGate>
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
    with_flag(a.act == Activation::kRelu, [&](auto relu) {
      using T = typename decltype(dtype)::type;
      const Matrix m = longest_rows(p, a.mask != nullptr);
      const AddAct<T, decltype(relu)::value> op{(const T*)a.x, (const T*)a.r, (T*)a.out,
                                                a.mask,        m.cols,        ceil_div(m.cols, 8)};
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
    with_gate(a.gate, [&](auto gate) {
      constexpr fastres::Gate kGate = decltype(gate)::value;
      if constexpr (kGate != fastres::Gate::kAffine) {
        using T = typename decltype(dtype)::type;
        const Matrix m = longest_rows(p, kGate == fastres::Gate::kMask);
        const ActBackward<T, kGate> op{
            {(const T*)a.grad_out, a.gate_ptr, nullptr, nullptr, m.cols, ceil_div(m.cols, 8)},
            (T*)a.grad};
        map_flat(op, m, p.threads, p.numel() * int64_t(sizeof(T)) * 2);
      }
    });
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
