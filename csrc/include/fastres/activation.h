// Activations, and how their backward knows the derivative.
//
// An activation is a functor with value(v) and derivative(v); one whose derivative is 0 or 1 and
// can be read off its output has open(v) instead. They are written once, for scalars on host and
// device and for the CPU's packs, in the operations that stand before them here and again in
// simd.h: arithmetic, like(v, c) for a constant of v's type, less, both, select, exponential,
// error_function.
#pragma once

#include <math.h>

#include "fastres/dtype.h"

namespace fastres {

// Their codes: in `with_activation` below, and in ACT_CODES of the Python adapters.
enum class Activation : int {
  kNone = 0,
  kRelu = 1,
  kRelu6 = 2,
  kSilu = 3,
  kGelu = 4,
  kGeluTanh = 5,
  kLeakyRelu = 6,
  kHardswish = 7,
};
inline constexpr int kActivations = 8;

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

// ---- what the functors are written in ----

FASTRES_HD float like(float, double constant) { return float(constant); }
FASTRES_HD double like(double, double constant) { return constant; }
FASTRES_HD bool less(float a, float b) { return a < b; }
FASTRES_HD bool less(double a, double b) { return a < b; }
FASTRES_HD bool both(bool a, bool b) { return a && b; }
FASTRES_HD float select(bool condition, float a, float b) { return condition ? a : b; }
FASTRES_HD double select(bool condition, double a, double b) { return condition ? a : b; }
FASTRES_HD float exponential(float v) { return expf(v); }
FASTRES_HD double exponential(double v) { return exp(v); }
FASTRES_HD float error_function(float v) { return erff(v); }
FASTRES_HD double error_function(double v) { return erf(v); }

// ---- activations, beside none and ReLU ----

// Closed for NaN, as in torch; the value lets NaN and -0.0 through.
struct Relu6 {
  static constexpr bool kGate = true;
  template <class V>
  static FASTRES_HD V value(const V& v) {
    const V zero = like(v, 0), six = like(v, 6);
    return select(less(v, zero), zero, select(less(six, v), six, v));
  }
  template <class V>
  static FASTRES_HD auto open(const V& v) {
    return both(less(like(v, 0), v), less(v, like(v, 6)));
  }
};

// v * sigmoid(v)
struct Silu {
  static constexpr bool kGate = false;
  template <class V>
  static FASTRES_HD V value(const V& v) {
    return v / (like(v, 1) + exponential(-v));
  }
  template <class V>
  static FASTRES_HD V derivative(const V& v) {
    const V one = like(v, 1), s = one / (one + exponential(-v));
    return s * (one + v * (one - s));
  }
};

// v * Phi(v), with the distribution Phi and the density phi of the standard normal.
struct Gelu {
  static constexpr bool kGate = false;
  template <class V>
  static FASTRES_HD V distribution(const V& v) {
    return like(v, 0.5) * (like(v, 1) + error_function(v * like(v, 0.70710678118654752)));
  }
  template <class V>
  static FASTRES_HD V value(const V& v) {
    return v * distribution(v);
  }
  template <class V>
  static FASTRES_HD V derivative(const V& v) {
    const V density = like(v, 0.39894228040143268) * exponential(like(v, -0.5) * v * v);
    return distribution(v) + v * density;
  }
};

// v * (1 + tanh(u)) / 2 = v * sigmoid(2u) with 2u = kSlope * (v + kCubic * v^3)
struct GeluTanh {
  static constexpr bool kGate = false;
  static constexpr double kSlope = 1.5957691216057308, kCubic = 0.044715;
  // exp(-2u)
  template <class V>
  static FASTRES_HD V power(const V& v) {
    return exponential(like(v, -kSlope) * (v + like(v, kCubic) * v * v * v));
  }
  template <class V>
  static FASTRES_HD V value(const V& v) {
    return v / (like(v, 1) + power(v));
  }
  template <class V>
  static FASTRES_HD V derivative(const V& v) {
    const V one = like(v, 1), p = power(v), s = one / (one + p);
    const V rest = select(less(like(v, 0), v), p * s, one - s);  // 1 - s without cancellation
    const V inner = like(v, kSlope) * (one + like(v, 3 * kCubic) * v * v);
    return s + v * (s * rest) * inner;
  }
};

// Its slope is torch's default.
struct LeakyRelu {
  static constexpr bool kGate = false;
  template <class V>
  static FASTRES_HD V value(const V& v) {
    return select(less(like(v, 0), v), v, v * like(v, 0.01));
  }
  template <class V>
  static FASTRES_HD V derivative(const V& v) {
    return select(less(like(v, 0), v), like(v, 1), like(v, 0.01));
  }
};

// v * min(max(v + 3, 0), 6) / 6; at the kinks the outer pieces' derivative, as in torch.
struct Hardswish {
  static constexpr bool kGate = false;
  template <class V>
  static FASTRES_HD V value(const V& v) {
    return v * Relu6::value(v + like(v, 3)) / like(v, 6);
  }
  template <class V>
  static FASTRES_HD V derivative(const V& v) {
    const V zero = like(v, 0), one = like(v, 1), inner = v / like(v, 3) + like(v, 0.5);
    const V right = select(less(v, like(v, 3)), inner, select(less(zero, v), one, inner));
    return select(less(like(v, -3), v), right, select(less(v, zero), zero, right));
  }
};

// g * act'(v); where a gate is closed, 0 whatever g is.
template <class Act, class V>
FASTRES_HD V backward(const V& g, const V& v) {
  if constexpr (Act::kGate) {
    return select(Act::open(v), g, like(g, 0));
  } else {
    return g * Act::derivative(v);
  }
}

// None and ReLU have kernels of their own.
FASTRES_HD bool is_other(Activation act) { return int(act) > int(Activation::kRelu); }
inline bool is_gate(Activation act) { return int(act) <= int(Activation::kRelu6); }

// Calls f with the functor of any other activation.
FASTRES_EITHER_SIDE
template <class F>
FASTRES_HD auto with_activation(Activation act, const F& f) {
  switch (act) {
    case Activation::kRelu6:
      return f(Relu6{});
    case Activation::kSilu:
      return f(Silu{});
    case Activation::kGelu:
      return f(Gelu{});
    case Activation::kGeluTanh:
      return f(GeluTanh{});
    case Activation::kLeakyRelu:
      return f(LeakyRelu{});
    default:
      return f(Hardswish{});
  }
}

}  // namespace fastres
