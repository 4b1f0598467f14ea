// Activations and the gate their backward uses.
#pragma once

#include "fastres/dtype.h"

namespace fastres {

enum class Activation : int { kNone = 0, kRelu = 1 };

// How backward learns the activation's derivative.
enum class Gate : int {
  kNone = 0,    // derivative 1 everywhere
  kMask = 1,    // one bit per element
  kAffine = 2,  // recomputed from y, scale and shift
  kOutput = 3,  // from the stored output
};

// NaN passes and -0.0 stays -0.0, as in torch.
template <class A>
FASTRES_HD A relu(A v) {
  return v < A(0) ? A(0) : v;
}

// Derivative of relu at the output value as stored in T, asked before that rounding took place.
template <class T>
FASTRES_HD bool relu_gate(Acc<T> before_rounding) {
  return !(before_rounding <= RoundsToZero<T>::bound());
}

}  // namespace fastres
