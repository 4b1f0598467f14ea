// Sixteen elements at a time, whatever the register width.
//
// This header is compiled once per instruction set, with FASTRES_ISA naming the namespace. A
// Pack<A> holds 16 values of the arithmetic type A (float or double) in as many registers as they
// take; a GateLanes<A> holds 16 truth values. Kernels are written over packs, and the end of a row
// goes through the same code with `Part` lanes instead of `Full`.
#pragma once

#include <cstdint>
#include <cstring>

#include "fastres/activation.h"
#include "fastres/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTRES_INLINE inline __attribute__((always_inline))
// Over the parts of a pack, which must become registers.
#define FASTRES_UNROLL _Pragma("GCC unroll 16")
// Over packs, where it pays: the baseline has neither the registers nor anybody's hurry, and would
// take longer to compile than all the rest.
#if defined(__AVX2__)
#define FASTRES_UNROLL_ROWS _Pragma("GCC unroll 8")
#else
#define FASTRES_UNROLL_ROWS _Pragma("GCC unroll 1")
#endif

namespace fastres::cpu::FASTRES_ISA {

inline constexpr int kPack = 16;
#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

typedef float VectorF __attribute__((vector_size(kVectorBytes)));
typedef double VectorD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VectorI32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VectorI64 __attribute__((vector_size(kVectorBytes)));

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = VectorF;
  using mask = VectorI32;
  using lane = int32_t;
};
template <>
struct VectorOf<double> {
  using type = VectorD;
  using mask = VectorI64;
  using lane = int64_t;
};

template <class A>
struct Pack {
  using Vector = typename VectorOf<A>::type;
  static constexpr int kLanes = kVectorBytes / int(sizeof(A));
  static constexpr int kParts = kPack / kLanes;
  Vector v[kParts];
};

// How many of the 16 lanes exist in memory.
struct Full {
  static constexpr bool kFull = true;
  static constexpr int n = kPack;
};
struct Part {
  static constexpr bool kFull = false;
  int n;
};

template <class A, class F>
FASTRES_INLINE Pack<A> each(F f) {
  Pack<A> r;
  FASTRES_UNROLL
  for (int i = 0; i < Pack<A>::kParts; ++i) {
    r.v[i] = f(i);
  }
  return r;
}

template <class A>
FASTRES_INLINE Pack<A> broadcast(A value) {
  return each<A>([&](int) { return value - typename Pack<A>::Vector{}; });
}

template <class A>
FASTRES_INLINE Pack<A> operator+(const Pack<A>& a, const Pack<A>& b) {
  return each<A>([&](int i) { return a.v[i] + b.v[i]; });
}
template <class A>
FASTRES_INLINE Pack<A> operator-(const Pack<A>& a, const Pack<A>& b) {
  return each<A>([&](int i) { return a.v[i] - b.v[i]; });
}
template <class A>
FASTRES_INLINE Pack<A> operator*(const Pack<A>& a, const Pack<A>& b) {
  return each<A>([&](int i) { return a.v[i] * b.v[i]; });
}

template <class A>
FASTRES_INLINE Pack<A> operator/(const Pack<A>& a, const Pack<A>& b) {
  return each<A>([&](int i) { return a.v[i] / b.v[i]; });
}
template <class A>
FASTRES_INLINE Pack<A> operator-(const Pack<A>& a) {
  return each<A>([&](int i) { return -a.v[i]; });
}
template <class A>
FASTRES_INLINE Pack<A> like(const Pack<A>&, double constant) {
  return broadcast(A(constant));
}

// One rounding where the instruction set has it, two in the baseline; never the compiler's choice,
// so that forward and the gate recomputed in backward always agree.
FASTRES_INLINE VectorF fma_vector(VectorF a, VectorF b, VectorF c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
FASTRES_INLINE VectorD fma_vector(VectorD a, VectorD b, VectorD c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// max(0, v) of x86 returns its second operand for a NaN and for two zeros: relu() exactly.
FASTRES_INLINE VectorF relu_vector(VectorF v) {
#if defined(__AVX512F__)
  return _mm512_max_ps(VectorF{}, v);
#elif defined(__AVX2__)
  return _mm256_max_ps(VectorF{}, v);
#else
  return v < 0 ? VectorF{} : v;
#endif
}
FASTRES_INLINE VectorD relu_vector(VectorD v) {
#if defined(__AVX512F__)
  return _mm512_max_pd(VectorD{}, v);
#elif defined(__AVX2__)
  return _mm256_max_pd(VectorD{}, v);
#else
  return v < 0 ? VectorD{} : v;
#endif
}

template <class A>
FASTRES_INLINE Pack<A> fma(const Pack<A>& a, const Pack<A>& b, const Pack<A>& c) {
  return each<A>([&](int i) { return fma_vector(a.v[i], b.v[i], c.v[i]); });
}
template <class A>
FASTRES_INLINE Pack<A> relu(const Pack<A>& a) {
  return each<A>([&](int i) { return relu_vector(a.v[i]); });
}

// ---- gates ----

#if defined(__AVX512F__)
template <class A>
struct GateLanes {
  uint32_t bits;
};

template <class A>
FASTRES_INLINE GateLanes<A> gate_of_bits(uint32_t bits) {
  return {bits};
}
template <class A>
FASTRES_INLINE uint32_t bits_of(GateLanes<A> gate) {
  return gate.bits;
}
FASTRES_INLINE GateLanes<float> not_le(const Pack<float>& a, const Pack<float>& b) {
  return {_mm512_cmp_ps_mask(a.v[0], b.v[0], _CMP_NLE_UQ)};
}
FASTRES_INLINE GateLanes<double> not_le(const Pack<double>& a, const Pack<double>& b) {
  const uint32_t low = _mm512_cmp_pd_mask(a.v[0], b.v[0], _CMP_NLE_UQ);
  const uint32_t high = _mm512_cmp_pd_mask(a.v[1], b.v[1], _CMP_NLE_UQ);
  return {low | high << 8};
}
FASTRES_INLINE GateLanes<float> less(const Pack<float>& a, const Pack<float>& b) {
  return {_mm512_cmp_ps_mask(a.v[0], b.v[0], _CMP_LT_OQ)};
}
FASTRES_INLINE GateLanes<double> less(const Pack<double>& a, const Pack<double>& b) {
  const uint32_t low = _mm512_cmp_pd_mask(a.v[0], b.v[0], _CMP_LT_OQ);
  const uint32_t high = _mm512_cmp_pd_mask(a.v[1], b.v[1], _CMP_LT_OQ);
  return {low | high << 8};
}
template <class A>
FASTRES_INLINE GateLanes<A> both(GateLanes<A> a, GateLanes<A> b) {
  return {a.bits & b.bits};
}
template <class A>
FASTRES_INLINE GateLanes<A> either(GateLanes<A> a, GateLanes<A> b) {
  return {a.bits | b.bits};
}
FASTRES_INLINE Pack<float> select(GateLanes<float> gate, const Pack<float>& a,
                                  const Pack<float>& b) {
  return {{_mm512_mask_blend_ps(__mmask16(gate.bits), b.v[0], a.v[0])}};
}
FASTRES_INLINE Pack<double> select(GateLanes<double> gate, const Pack<double>& a,
                                   const Pack<double>& b) {
  return {{_mm512_mask_blend_pd(__mmask8(gate.bits), b.v[0], a.v[0]),
           _mm512_mask_blend_pd(__mmask8(gate.bits >> 8), b.v[1], a.v[1])}};
}
FASTRES_INLINE Pack<float> keep(GateLanes<float> gate, const Pack<float>& a) {
  return {{_mm512_maskz_mov_ps(__mmask16(gate.bits), a.v[0])}};
}
FASTRES_INLINE Pack<double> keep(GateLanes<double> gate, const Pack<double>& a) {
  return {{_mm512_maskz_mov_pd(__mmask8(gate.bits), a.v[0]),
           _mm512_maskz_mov_pd(__mmask8(gate.bits >> 8), a.v[1])}};
}
#else
template <class A>
struct GateLanes {
  typename VectorOf<A>::mask m[Pack<A>::kParts];
};

template <class A>
FASTRES_INLINE GateLanes<A> gate_of_bits(uint32_t bits) {
  using Mask = typename VectorOf<A>::mask;
  using Lane = typename VectorOf<A>::lane;
  GateLanes<A> gate;
  FASTRES_UNROLL
  for (int i = 0; i < Pack<A>::kParts; ++i) {
    Mask lane_bit;
    FASTRES_UNROLL
    for (int j = 0; j < Pack<A>::kLanes; ++j) {
      lane_bit[j] = Lane(1) << (i * Pack<A>::kLanes + j);
    }
    gate.m[i] = ((Lane(bits) - Mask{}) & lane_bit) == lane_bit;
  }
  return gate;
}

template <class A>
FASTRES_INLINE uint32_t bits_of(const GateLanes<A>& gate) {
  uint32_t bits = 0;
  FASTRES_UNROLL
  for (int i = 0; i < Pack<A>::kParts; ++i) {
    uint32_t part = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(A) == 4) {
      part = uint32_t(_mm256_movemask_ps((__m256)gate.m[i]));
    } else {
      part = uint32_t(_mm256_movemask_pd((__m256d)gate.m[i]));
    }
#elif defined(__x86_64__)
    if constexpr (sizeof(A) == 4) {
      part = uint32_t(_mm_movemask_ps((__m128)gate.m[i]));
    } else {
      part = uint32_t(_mm_movemask_pd((__m128d)gate.m[i]));
    }
#else
    for (int j = 0; j < Pack<A>::kLanes; ++j) {
      part |= uint32_t(gate.m[i][j] & 1) << j;
    }
#endif
    bits |= part << (i * Pack<A>::kLanes);
  }
  return bits;
}

template <class A>
FASTRES_INLINE GateLanes<A> not_le(const Pack<A>& a, const Pack<A>& b) {
  GateLanes<A> gate;
  FASTRES_UNROLL
  for (int i = 0; i < Pack<A>::kParts; ++i) {
    gate.m[i] = ~(a.v[i] <= b.v[i]);
  }
  return gate;
}
template <class A>
FASTRES_INLINE GateLanes<A> less(const Pack<A>& a, const Pack<A>& b) {
  GateLanes<A> gate;
  FASTRES_UNROLL
  for (int i = 0; i < Pack<A>::kParts; ++i) {
    gate.m[i] = a.v[i] < b.v[i];
  }
  return gate;
}
template <class A>
FASTRES_INLINE GateLanes<A> both(const GateLanes<A>& a, const GateLanes<A>& b) {
  GateLanes<A> gate;
  FASTRES_UNROLL
  for (int i = 0; i < Pack<A>::kParts; ++i) {
    gate.m[i] = a.m[i] & b.m[i];
  }
  return gate;
}
template <class A>
FASTRES_INLINE GateLanes<A> either(const GateLanes<A>& a, const GateLanes<A>& b) {
  GateLanes<A> gate;
  FASTRES_UNROLL
  for (int i = 0; i < Pack<A>::kParts; ++i) {
    gate.m[i] = a.m[i] | b.m[i];
  }
  return gate;
}
template <class A>
FASTRES_INLINE Pack<A> select(const GateLanes<A>& gate, const Pack<A>& a, const Pack<A>& b) {
  using Mask = typename VectorOf<A>::mask;
  return each<A>([&](int i) {
    return (typename Pack<A>::Vector)(((Mask)a.v[i] & gate.m[i]) | ((Mask)b.v[i] & ~gate.m[i]));
  });
}
template <class A>
FASTRES_INLINE Pack<A> keep(const GateLanes<A>& gate, const Pack<A>& a) {
  using Mask = typename VectorOf<A>::mask;
  return each<A>([&](int i) { return (typename Pack<A>::Vector)((Mask)a.v[i] & gate.m[i]); });
}
#endif

FASTRES_INLINE uint32_t lane_bits(int n) { return (1u << n) - 1u; }

// Zero in the lanes that do not exist.
template <class A, class Lanes>
FASTRES_INLINE Pack<A> existing(Lanes lanes, const Pack<A>& a) {
  if constexpr (Lanes::kFull) {
    return a;
  } else {
    return keep(gate_of_bits<A>(lane_bits(lanes.n)), a);
  }
}

// Mask rows start on a byte, and packs on a multiple of 16 in a row: two bytes each, or what is
// left of the row.
template <class Lanes>
FASTRES_INLINE uint32_t load_bits(const uint8_t* p, Lanes lanes) {
  if (lanes.n <= 8) {
    return p[0];
  }
  return p[0] | uint32_t(p[1]) << 8;
}
template <class Lanes>
FASTRES_INLINE void store_bits(uint8_t* p, uint32_t bits, Lanes lanes) {
  if constexpr (!Lanes::kFull) {
    bits &= lane_bits(lanes.n);
  }
  p[0] = uint8_t(bits);
  if (lanes.n > 8) {
    p[1] = uint8_t(bits >> 8);
  }
}

// ---- memory ----

// Vectors as they lie in memory: at any element's boundary, whatever type wrote them. Copying a
// whole Pack with memcpy instead would make gcc go through the stack.
typedef VectorF MemoryF __attribute__((aligned(4), may_alias));
typedef VectorD MemoryD __attribute__((aligned(8), may_alias));

FASTRES_INLINE Pack<float> load(const float* p, Full) {
  return each<float>(
      [&](int i) -> VectorF { return *(const MemoryF*)(p + i * Pack<float>::kLanes); });
}
FASTRES_INLINE Pack<double> load(const double* p, Full) {
  return each<double>(
      [&](int i) -> VectorD { return *(const MemoryD*)(p + i * Pack<double>::kLanes); });
}
FASTRES_INLINE void store(float* p, const Pack<float>& a, Full) {
  FASTRES_UNROLL
  for (int i = 0; i < Pack<float>::kParts; ++i) {
    *(MemoryF*)(p + i * Pack<float>::kLanes) = a.v[i];
  }
}
FASTRES_INLINE void store(double* p, const Pack<double>& a, Full) {
  FASTRES_UNROLL
  for (int i = 0; i < Pack<double>::kParts; ++i) {
    *(MemoryD*)(p + i * Pack<double>::kLanes) = a.v[i];
  }
}

#if defined(__AVX512F__)

FASTRES_INLINE __m256i load_16bit(const void* p, Full) {
  return _mm256_loadu_si256((const __m256i*)p);
}
FASTRES_INLINE __m256i load_16bit(const void* p, Part lanes) {
  return _mm256_maskz_loadu_epi16(__mmask16(lane_bits(lanes.n)), p);
}
FASTRES_INLINE void store_16bit(void* p, __m256i a, Full) { _mm256_storeu_si256((__m256i*)p, a); }
FASTRES_INLINE void store_16bit(void* p, __m256i a, Part lanes) {
  _mm256_mask_storeu_epi16(p, __mmask16(lane_bits(lanes.n)), a);
}

// One permutation instead of a conversion and a shift: word i goes to the upper half of lane i.
template <class Lanes>
FASTRES_INLINE Pack<float> load(const BFloat16* p, Lanes lanes) {
  const __m512i words = _mm512_castsi256_si512(load_16bit(p, lanes));
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i source = _mm512_slli_epi32(lane, 16);
  return {{(VectorF)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, source, words)}};
}
template <class Lanes>
FASTRES_INLINE Pack<float> load(const Float16* p, Lanes lanes) {
  return {{_mm512_cvtph_ps(load_16bit(p, lanes))}};
}
FASTRES_INLINE Pack<float> load(const float* p, Part lanes) {
  return {{_mm512_maskz_loadu_ps(__mmask16(lane_bits(lanes.n)), p)}};
}
FASTRES_INLINE Pack<double> load(const double* p, Part lanes) {
  const uint32_t bits = lane_bits(lanes.n);
  return {{_mm512_maskz_loadu_pd(__mmask8(bits), p),
           _mm512_maskz_loadu_pd(__mmask8(bits >> 8), p + 8)}};
}

template <class Lanes>
FASTRES_INLINE void store(BFloat16* p, const Pack<float>& a, Lanes lanes) {
  const __m512i bits = (__m512i)a.v[0];
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v[0], a.v[0], _CMP_UNORD_Q);
  const __m512i up =
      _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  __m512i rounded = _mm512_add_epi32(bits, up);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  const __m512i lane =
      _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 30 << 16 | 28, 26 << 16 | 24, 22 << 16 | 20,
                       18 << 16 | 16, 14 << 16 | 12, 10 << 16 | 8, 6 << 16 | 4, 2 << 16 | 0);
  const __m512i upper_words = _mm512_or_si512(lane, _mm512_set1_epi32(0x00010001));
  const __m512i packed = _mm512_permutexvar_epi16(upper_words, rounded);
  store_16bit(p, _mm512_castsi512_si256(packed), lanes);
}
template <class Lanes>
FASTRES_INLINE void store(Float16* p, const Pack<float>& a, Lanes lanes) {
  store_16bit(p, _mm512_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), lanes);
}
FASTRES_INLINE void store(float* p, const Pack<float>& a, Part lanes) {
  _mm512_mask_storeu_ps(p, __mmask16(lane_bits(lanes.n)), a.v[0]);
}
FASTRES_INLINE void store(double* p, const Pack<double>& a, Part lanes) {
  const uint32_t bits = lane_bits(lanes.n);
  _mm512_mask_storeu_pd(p, __mmask8(bits), a.v[0]);
  _mm512_mask_storeu_pd(p + 8, __mmask8(bits >> 8), a.v[1]);
}

#else

#if defined(__AVX2__)

FASTRES_INLINE Pack<float> load(const BFloat16* p, Full) {
  return each<float>([&](int i) {
    const __m128i raw = _mm_loadu_si128((const __m128i*)p + i);
    return (VectorF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
  });
}
FASTRES_INLINE Pack<float> load(const Float16* p, Full) {
  return each<float>(
      [&](int i) { return (VectorF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + i)); });
}
FASTRES_INLINE __m256i round_to_bfloat16(VectorF v) {
  const __m256i bits = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = (__m256i)_mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, nan), 16);
}
FASTRES_INLINE void store(BFloat16* p, const Pack<float>& a, Full) {
  // packus works within 128-bit halves: its quarters come out as 0, 2, 1, 3.
  const __m256i packed = _mm256_packus_epi32(round_to_bfloat16(a.v[0]), round_to_bfloat16(a.v[1]));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
FASTRES_INLINE void store(Float16* p, const Pack<float>& a, Full) {
  FASTRES_UNROLL
  for (int i = 0; i < 2; ++i) {
    _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph(a.v[i], _MM_FROUND_TO_NEAREST_INT));
  }
}

#else

typedef uint32_t VectorU32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfU16 __attribute__((vector_size(kVectorBytes / 2)));

FASTRES_INLINE Pack<float> load(const BFloat16* p, Full) {
  return each<float>([&](int i) {
    HalfU16 raw;
    memcpy(&raw, p + i * Pack<float>::kLanes, sizeof(raw));
    return (VectorF)(__builtin_convertvector(raw, VectorU32) << 16);
  });
}
FASTRES_INLINE void store(BFloat16* p, const Pack<float>& a, Full) {
  FASTRES_UNROLL
  for (int i = 0; i < Pack<float>::kParts; ++i) {
    const VectorU32 bits = (VectorU32)a.v[i];
    const VectorU32 nan = (VectorU32)(a.v[i] != a.v[i]);
    const VectorU32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const VectorU32 kept = ((bits | 0x400000u) & nan) | (rounded & ~nan);
    const HalfU16 raw = __builtin_convertvector(kept >> 16, HalfU16);
    memcpy(p + i * Pack<float>::kLanes, &raw, sizeof(raw));
  }
}

// Software conversion is long, and never fast: one copy of it is enough.
__attribute__((noinline)) inline Pack<float> load(const Float16* p, Full) {
  float lanes[kPack];
  for (int i = 0; i < kPack; ++i) {
    lanes[i] = to_acc(p[i]);
  }
  return load(lanes, Full{});
}
__attribute__((noinline)) inline void store(Float16* p, const Pack<float>& a, Full) {
  float lanes[kPack];
  store(lanes, a, Full{});
  for (int i = 0; i < kPack; ++i) {
    p[i] = FromAcc<Float16>::convert(lanes[i]);
  }
}

#endif

template <class T>
FASTRES_INLINE Pack<Acc<T> > load(const T* p, Part lanes) {
  T buffer[kPack] = {};
  for (int i = 0; i < lanes.n; ++i) {
    buffer[i] = p[i];
  }
  return load((const T*)buffer, Full{});
}
template <class T>
FASTRES_INLINE void store(T* p, const Pack<Acc<T> >& a, Part lanes) {
  T buffer[kPack];
  store(buffer, a, Full{});
  for (int i = 0; i < lanes.n; ++i) {
    p[i] = buffer[i];
  }
}

#endif

// As it would be read back.
template <class T>
FASTRES_INLINE Pack<Acc<T> > rounded(const Pack<Acc<T> >& a) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return a;
  } else {
    T buffer[kPack];
    store(buffer, a, Full{});
    return load((const T*)buffer, Full{});
  }
}

// ---- sums ----

FASTRES_INLINE Pack<double> widen(const Pack<double>& a) { return a; }
FASTRES_INLINE Pack<double> widen(const Pack<float>& a) {
  Pack<double> r;
  FASTRES_UNROLL
  for (int i = 0; i < Pack<float>::kParts; ++i) {
#if defined(__AVX512F__)
    r.v[2 * i] = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v[i]));
    r.v[2 * i + 1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v[i], 1));
#elif defined(__AVX2__)
    r.v[2 * i] = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v[i]));
    r.v[2 * i + 1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v[i], 1));
#else
    r.v[2 * i] = VectorD{double(a.v[i][0]), double(a.v[i][1])};
    r.v[2 * i + 1] = VectorD{double(a.v[i][2]), double(a.v[i][3])};
#endif
  }
  return r;
}

// Sum of the lanes of a vector, by halving.
FASTRES_INLINE double vector_sum(VectorD v) {
#if defined(__AVX512F__)
  const __m256d half = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
#elif defined(__AVX2__)
  const __m256d half = v;
#endif
#if defined(__AVX2__)
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
#else
  return v[0] + v[1];
#endif
}

FASTRES_INLINE double horizontal_sum(Pack<double> a) {
  FASTRES_UNROLL
  for (int half = Pack<double>::kParts / 2; half > 0; half /= 2) {
    FASTRES_UNROLL
    for (int i = 0; i < half; ++i) {
      a.v[i] = a.v[i] + a.v[i + half];
    }
  }
  return vector_sum(a.v[0]);
}

}  // namespace fastres::cpu::FASTRES_ISA
