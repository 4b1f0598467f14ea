// Activations over packs. None and ReLU are inlined; any other one is called by its address, once
// per pack, so that no kernel needs an instance of its own for it.
#pragma once

#include "cpu/simd.h"

namespace fastres::cpu::FASTRES_ISA {

struct NoActivation {
  template <class A>
  FASTRES_INLINE Pack<A> value(const Pack<A>& v) const {
    return v;
  }
  // The mask's bits of what stands before the activation and is stored behind it as T.
  template <class T>
  FASTRES_INLINE uint32_t bits(const Pack<Acc<T> >&) const {
    return 0xffffu;
  }
};

struct ReluActivation {
  template <class A>
  FASTRES_INLINE Pack<A> value(const Pack<A>& v) const {
    return relu(v);
  }
  template <class T>
  FASTRES_INLINE uint32_t bits(const Pack<Acc<T> >& v) const {
    return bits_of(not_le(v, broadcast(RoundsToZero<T>::bound())));
  }
};

template <class A>
struct AnyActivation {
  Pack<A> (*function)(Pack<A> v);
  Pack<A> (*backward)(Pack<A> g, Pack<A> v);
  // Whether backward is a gate, which is asked about what was stored.
  bool gate;

  FASTRES_INLINE Pack<A> value(const Pack<A>& v) const { return function(v); }
  template <class T>
  FASTRES_INLINE uint32_t bits(const Pack<A>& v) const {
    const Pack<A> open = backward(broadcast(A(1)), rounded<T>(v));
    return bits_of(not_le(open, broadcast(A(0))));
  }
};

template <class A>
AnyActivation<A> any_activation(Activation act);
extern template AnyActivation<float> any_activation<float>(Activation act);
extern template AnyActivation<double> any_activation<double>(Activation act);

// Calls f with what an activation is for arithmetic in A.
template <class A, class F>
void with_act(Activation act, const F& f) {
  switch (act) {
    case Activation::kNone:
      return f(NoActivation{});
    case Activation::kRelu:
      return f(ReluActivation{});
    default:
      return f(any_activation<A>(act));
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
