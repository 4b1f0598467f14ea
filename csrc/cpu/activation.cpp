// The activations' functors over packs: exponentials and the error function in float32 by
// polynomials, in float64 lane by lane from the C library.
#include "cpu/activation.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

template <int kTerms>
FASTRES_INLINE VectorF polynomial(const float (&coefficients)[kTerms], VectorF v) {
  VectorF sum = coefficients[kTerms - 1] - VectorF{};
  FASTRES_UNROLL
  for (int i = kTerms - 2; i >= 0; --i) {
    sum = fma_vector(sum, v, coefficients[i] - VectorF{});
  }
  return sum;
}

// 2^n * exp(r) with n = round(v / ln 2), |r| <= ln(2) / 2. exp(r) = 1 + r + r^2 P(r), of which the
// polynomial P is the best one of its degree, to a relative 3e-9 of exp(r). The result is within
// 1.5 ulp; a NaN stays one.
FASTRES_INLINE VectorF exp_vector(VectorF v) {
  constexpr float kP[] = {0.49999994f, 0.166665196f, 0.0416683927f, 0.00836878084f, 0.00138144649f};
  // Beyond, exp is 0 or infinite whatever v is, and 2^n must not be formed.
  const VectorF low = -104.0f - VectorF{}, high = 89.0f - VectorF{};
  v = v < low ? low : v;
  v = high < v ? high : v;
  // Adding 1.5 * 2^23 leaves no fraction bits, and the integer in the lowest ones.
  const VectorF magic = 0x1.8p23f - VectorF{};
  const VectorF shifted = v * (1.44269504f - VectorF{}) + magic;
  const VectorF n = shifted - magic;
  // ln 2 in two parts; the product with the first one, of 9 bits, is exact.
  VectorF r = v - n * (0x1.63p-1f - VectorF{});
  r = fma_vector(n, 2.12194440e-4f - VectorF{}, r);
  const VectorF power = fma_vector(polynomial(kP, r), r * r, r) + 1.0f;
  // 2^n in two factors: n is -150 at least, and 128 at most.
  const VectorI32 exponent = (VectorI32)shifted - (VectorI32)magic, half = exponent >> 1;
  const VectorF first = (VectorF)((half + 127) << 23);
  const VectorF second = (VectorF)((exponent - half + 127) << 23);
  return power * first * second;
}

// x + x Q(x^2) below 1, and 1 - exp(-R(|x|)) with the sign of x from there on, by the best
// polynomials of their degrees, to 1e-9. From 4 on it is 1 in float32. Within 2 ulp.
FASTRES_INLINE VectorF erf_vector(VectorF v) {
  constexpr float kQ[] = {0.128379151f,   -0.376126051f,    0.112834305f,   -0.0268485919f,
                          0.00517974934f, -0.000794235559f, 7.64711585e-05f};
  constexpr float kR[] = {0.000353708921f, 1.12704003f,    0.638225615f,  0.103037432f,
                          -0.0218053516f,  0.00293961563f, -0.0001855749f};
  const VectorF zero = {}, one = 1.0f - VectorF{}, four = 4.0f - VectorF{};
  const VectorF size = v < zero ? -v : v;
  const VectorF inner = fma_vector(polynomial(kQ, v * v), v, v);
  const VectorF most = four < size ? four : size;
  const VectorF tail = one - exp_vector(-polynomial(kR, most));
  const VectorF outer = v < zero ? -tail : tail;
  return size < one ? inner : outer;
}

}  // namespace

FASTRES_INLINE Pack<float> exponential(const Pack<float>& a) {
  return each<float>([&](int i) { return exp_vector(a.v[i]); });
}
FASTRES_INLINE Pack<float> error_function(const Pack<float>& a) {
  return each<float>([&](int i) { return erf_vector(a.v[i]); });
}

template <class F>
FASTRES_INLINE Pack<double> each_lane(const Pack<double>& a, F f) {
  Pack<double> r;
  for (int i = 0; i < Pack<double>::kParts; ++i) {
    for (int j = 0; j < Pack<double>::kLanes; ++j) {
      r.v[i][j] = f(a.v[i][j]);
    }
  }
  return r;
}
FASTRES_INLINE Pack<double> exponential(const Pack<double>& a) {
  return each_lane(a, [](double v) { return exp(v); });
}
FASTRES_INLINE Pack<double> error_function(const Pack<double>& a) {
  return each_lane(a, [](double v) { return erf(v); });
}

namespace {

template <class Act, class A>
Pack<A> value_of(Pack<A> v) {
  return Act::value(v);
}
template <class Act, class A>
Pack<A> backward_of(Pack<A> g, Pack<A> v) {
  return fastres::backward<Act>(g, v);
}

}  // namespace

template <class A>
AnyActivation<A> any_activation(Activation act) {
  return with_activation(act, [](auto functor) -> AnyActivation<A> {
    using Act = decltype(functor);
    return {value_of<Act, A>, backward_of<Act, A>, Act::kGate};
  });
}
template AnyActivation<float> any_activation<float>(Activation act);
template AnyActivation<double> any_activation<double>(Activation act);

}  // namespace fastres::cpu::FASTRES_ISA
