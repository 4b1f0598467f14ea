// The gradient as it arrives behind the activation.
#pragma once

#include "cpu/matrix.h"

namespace fastres::cpu::FASTRES_ISA {

// Reads grad_out and zeroes it where the activation was flat. kAffine needs this element's y.
template <class T, bool kPerColumn, fastres::Gate kGate>
struct GatedGradient {
  using A = Acc<T>;
  const T* grad_out;
  const void* source;  // mask or output
  const A* scale;      // kAffine only
  const A* shift;
  int64_t cols;
  int64_t mask_stride;

  struct Params {
    Pack<A> scale, shift;
  };

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t channel, Lanes lanes) const {
    Params p;
    if constexpr (kGate == fastres::Gate::kAffine) {
      p.scale = parameter<kPerColumn>(scale, channel, lanes);
      p.shift = parameter<kPerColumn>(shift, channel, lanes);
    }
    return p;
  }

  FASTRES_INLINE void prefetch(int64_t at) const {
    prefetch_packs(grad_out + at);
    if constexpr (kGate == fastres::Gate::kOutput) {
      prefetch_packs((const T*)source + at);
    }
  }

  template <class Lanes>
  FASTRES_INLINE Pack<A> get(int64_t row, int64_t col, const Params& p, Lanes lanes,
                             const Pack<A>& y) const {
    const Pack<A> grad = load(grad_out + row * cols + col, lanes);
    if constexpr (kGate == fastres::Gate::kNone) {
      return grad;
    } else if constexpr (kGate == fastres::Gate::kMask) {
      const uint8_t* bits = (const uint8_t*)source + row * mask_stride + col / 8;
      return keep(gate_of_bits<A>(load_bits(bits, lanes)), grad);
    } else if constexpr (kGate == fastres::Gate::kAffine) {
      return keep(not_le(fma(p.scale, y, p.shift), broadcast(RoundsToZero<T>::bound())), grad);
    } else {
      const Pack<A> out = load((const T*)source + row * cols + col, lanes);
      return keep(not_le(out, broadcast(A(0))), grad);
    }
  }
};

template <class T, bool kPerColumn, fastres::Gate kGate>
GatedGradient<T, kPerColumn, kGate> gated_gradient(const void* grad_out, const void* source,
                                                   const void* stats, const Problem& p) {
  using A = Acc<T>;
  const A* scale = nullptr;
  const A* shift = nullptr;
  if constexpr (kGate == fastres::Gate::kAffine) {
    scale = (const A*)stats + kScale * p.c;
    shift = (const A*)stats + kShift * p.c;
  }
  return {(const T*)grad_out, source, scale, shift, p.cols(), ceil_div(p.cols(), 8)};
}

}  // namespace fastres::cpu::FASTRES_ISA
