// The gradient as it arrives behind the activation.
#pragma once

#include "cpu/activation.h"
#include "cpu/matrix.h"

namespace fastres::cpu::FASTRES_ISA {

// Reads grad_out and multiplies it by the activation's derivative; a gate zeroes it. Where
// `reads_y` that needs this element's y.
template <class T, bool kPerColumn, Gating kGate>
struct GatedGradient {
  using A = Acc<T>;
  const T* grad_out;
  const void* source;  // mask or output
  const A* scale;      // where y is read
  const A* shift;
  int64_t cols;
  int64_t mask_stride;
  AnyActivation<A> act;  // kAny only

  struct Params {
    Pack<A> scale, shift;
  };

  FASTRES_INLINE bool reads_y() const {
    return kGate == Gating::kReluOfY || (kGate == Gating::kAny && scale);
  }

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t channel, Lanes lanes) const {
    Params p;
    if (reads_y()) {
      p.scale = parameter<kPerColumn>(scale, channel, lanes);
      p.shift = parameter<kPerColumn>(shift, channel, lanes);
    }
    return p;
  }

  FASTRES_INLINE void prefetch(int64_t at) const {
    prefetch_packs(grad_out + at);
    if constexpr (kGate == Gating::kReluOfOutput) {
      prefetch_packs((const T*)source + at);
    }
  }

  template <class Lanes>
  FASTRES_INLINE Pack<A> get(int64_t row, int64_t col, const Params& p, Lanes lanes,
                             const Pack<A>& y) const {
    const Pack<A> grad = load(grad_out + row * cols + col, lanes);
    if constexpr (kGate == Gating::kNone) {
      return grad;
    } else if constexpr (kGate == Gating::kMask) {
      const uint8_t* bits = (const uint8_t*)source + row * mask_stride + col / 8;
      return keep(gate_of_bits<A>(load_bits(bits, lanes)), grad);
    } else if constexpr (kGate == Gating::kReluOfY) {
      return keep(not_le(fma(p.scale, y, p.shift), broadcast(RoundsToZero<T>::bound())), grad);
    } else if constexpr (kGate == Gating::kReluOfOutput) {
      const Pack<A> out = load((const T*)source + row * cols + col, lanes);
      return keep(not_le(out, broadcast(A(0))), grad);
    } else if (!reads_y()) {
      return act.backward(grad, load((const T*)source + row * cols + col, lanes));
    } else {
      const Pack<A> v = fma(p.scale, y, p.shift);
      return act.backward(grad, act.gate ? rounded<T>(v) : v);
    }
  }
};

template <class T, bool kPerColumn, Gating kGate, class Args>
GatedGradient<T, kPerColumn, kGate> gated_gradient(const Args& a) {
  using A = Acc<T>;
  const Problem& p = a.problem;
  GatedGradient<T, kPerColumn, kGate> found{
      (const T*)a.grad_out, a.gate_ptr, nullptr, nullptr, p.cols(), ceil_div(p.cols(), 8), {}};
  if constexpr (requires { a.stats; }) {
    if (a.gate == Gate::kAffine) {
      found.scale = (const A*)a.stats[0] + kScale * p.c;
      found.shift = (const A*)a.stats[0] + kShift * p.c;
    }
  }
  if constexpr (kGate == Gating::kAny) {
    found.act = any_activation<A>(a.act);
  }
  return found;
}

// [3, C]: a, b, c of grad_y = a * g + b * y + c.
template <class A>
void fill_coefficients(const BackwardApplyArgs& a, int branch, A* out) {
  const int64_t c = a.problem.c;
  const A* stats = (const A*)a.stats[branch];
  for (int64_t i = 0; i < c; ++i) {
    const BackwardCoefficients k = backward_coefficients(
        stats[kMean * c + i], stats[kInvstd * c + i], stats[kScale * c + i], a.sums ? a.sums[i] : 0,
        a.sums ? a.sums[(1 + branch) * c + i] : 0, double(a.count));
    out[i] = A(k.a);
    out[c + i] = A(k.b);
    out[2 * c + i] = A(k.c);
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
