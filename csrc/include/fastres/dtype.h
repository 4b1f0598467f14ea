// Storage types of activations, and the arithmetic type each one is computed in. Conversions are
// written out for the host; a GPU has instructions that do the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "fastres/macros.h"

namespace fastres {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class To, class From>
FASTRES_HD To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FASTRES_HD float to_acc(float v) { return v; }
FASTRES_HD double to_acc(double v) { return v; }

FASTRES_HD float to_acc(BFloat16 v) { return bit_copy<float>(uint32_t(v.bits) << 16); }

FASTRES_HD float to_acc(Float16 v) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(v.bits));
  return value;
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude > 0x7c00u) {
    bits = 0x7fc00000u | (magnitude << 13);
  } else if (magnitude == 0x7c00u) {
    bits = 0x7f800000u;
  } else if (magnitude < 0x400u) {
    bits = bit_copy<uint32_t>(float(magnitude) * 0x1p-24f);
  } else {
    bits = (magnitude << 13) + (112u << 23);
  }
  return bit_copy<float>(sign | bits);
#endif
}

template <class T>
struct FromAcc;

template <>
struct FromAcc<float> {
  static FASTRES_HD float convert(float v) { return v; }
};

template <>
struct FromAcc<double> {
  static FASTRES_HD double convert(double v) { return v; }
};

// Round to nearest even; a NaN stays a NaN (its payload is cut, and made quiet).
template <>
struct FromAcc<BFloat16> {
  static FASTRES_HD BFloat16 convert(float v) {
#if defined(__CUDA_ARCH__)
    uint16_t rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(v));
    return {rounded};
#else
    const uint32_t bits = bit_copy<uint32_t>(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
      return {uint16_t((bits >> 16) | 0x40u)};
    }
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
  }
};

template <>
struct FromAcc<Float16> {
  static FASTRES_HD Float16 convert(float v) {
#if defined(__CUDA_ARCH__)
    uint16_t rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(v));
    return {rounded};
#else
    const uint32_t bits = bit_copy<uint32_t>(v);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
      // Adding 2^23 leaves no fraction bits, so the sum itself rounds to nearest even.
      const float shifted = bit_copy<float>(magnitude) * 0x1p24f + 0x1p23f;
      half = bit_copy<uint32_t>(shifted) - 0x4b000000u;
    } else {
      half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    }
    return {uint16_t(sign | half)};
#endif
  }
};

// The largest value that rounds to zero in T (ties go to the even zero). `v > bound` in the
// arithmetic type is therefore the same question as `round(v) > 0` in the storage type.
template <class T>
struct RoundsToZero {
  static FASTRES_HD Acc<T> bound() { return 0; }
};
template <>
struct RoundsToZero<BFloat16> {
  static FASTRES_HD float bound() { return bit_copy<float>(uint32_t(0x8000)); }
};
template <>
struct RoundsToZero<Float16> {
  static FASTRES_HD float bound() { return 0x1p-25f; }
};

}  // namespace fastres
