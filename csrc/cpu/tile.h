// A register tile of a matrix product, the core of every convolution here.
//
// Up to kTileRows rows of one operand are read element by element and broadcast; kTileColumns
// columns of the other are read as whole vectors; the sums stay in registers over the whole of k.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace fastres::cpu::FASTRES_ISA {

inline constexpr int kVectorLanes = kVectorBytes / int(sizeof(float));
#if defined(__AVX512F__)
// 24 sums, 4 vectors of the columns and one broadcast value: 29 of 32 registers.
inline constexpr int kTileRows = 6, kTileVectors = 4;
#else
// 12 sums, 2 vectors and one value: 15 of 16 registers.
inline constexpr int kTileRows = 6, kTileVectors = 2;
#endif
inline constexpr int kLine = 64;  // bytes of a cache line
inline constexpr int kTileColumns = kTileVectors * kVectorLanes;

// Two values that neighbour in k: what AVX512-BF16 multiplies in one step.
struct Pair {
  BFloat16 first, second;
};

// What a step of k reads of an operand, of tensors of T: bfloat16 becomes float where there is no
// instruction for pairs. An operand is formed value by value, as `Formed<E>`.
template <class T>
struct OperandOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<BFloat16> {
  using type = Pair;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;
template <class E>
using Formed = std::conditional_t<std::is_same_v<E, Pair>, BFloat16, float>;
template <class E>
inline constexpr int kPerStep = sizeof(E) / sizeof(Formed<E>);

// Steps of k that so many values take.
template <class E>
FASTRES_INLINE int64_t steps_of(int64_t values) {
  return (values + kPerStep<E> - 1) / kPerStep<E>;
}

// A stretch of k: `length` steps from a row's own address plus `a`, and from `b`; of a weight, it
// begins at `step`.
template <class E>
struct Stretch {
  int64_t a;
  const E* b;
  int64_t length;
  int64_t step;
};

template <class E>
FASTRES_INLINE int64_t depth_of(const Stretch<E>* stretches, int64_t count) {
  int64_t depth = 0;
  for (int64_t i = 0; i < count; ++i) {
    depth += stretches[i].length;
  }
  return depth;
}

// Whether sums over a part of k need memory other than the result's, which would round them.
template <class T>
inline constexpr bool kInParts = !std::is_same_v<T, float>;

// What becomes of the sums of a tile.
template <class T = float>
struct TileEnd {
  bool accumulate;     // they start with what stands in c
  const T* bias;       // else with this per column, or zero where it is null
  const float* scale;  // per column: scale * sum + shift, or null
  const float* shift;
  bool relu;  // after that, and after the residual
  // Where T would round them: they start with those of earlier parts of k, or are left for the
  // next.
  bool from_parts = false, to_parts = false;
};

template <class E = float, class T = float>
struct Tile {
  const E* a[kTileRows];
  T* c[kTileRows];
  const T* residual[kTileRows];  // added where `has_residual`
  float* parts[kTileRows];       // whole tiles' columns, where `kInParts`
  bool has_residual;
  const char* ahead;  // memory that is asked for on the way, `ahead_step` bytes in each step of k
  int64_t ahead_step;
  int rows;     // of c that are written
  int columns;  // likewise
};

FASTRES_INLINE VectorF load_vector(const float* p) { return *(const MemoryF*)p; }
FASTRES_INLINE void store_vector(float* p, VectorF v) { *(MemoryF*)p = v; }
#if defined(__AVX512F__)
FASTRES_INLINE VectorF load_vector(const BFloat16* p) { return load(p, Full{}).v[0]; }
FASTRES_INLINE void store_vector(BFloat16* p, VectorF v) {
#if defined(__AVX512BF16__)
  // The instruction would round subnormal numbers to zero.
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(v, kSubnormal) == 0, true)) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
    return;
  }
#endif
  store(p, Pack<float>{{v}}, Full{});
}
#else
FASTRES_INLINE VectorF load_vector(const BFloat16* p) {
  VectorF v;
  for (int lane = 0; lane < kVectorLanes; ++lane) {
    v[lane] = to_acc(p[lane]);
  }
  return v;
}
FASTRES_INLINE void store_vector(BFloat16* p, VectorF v) {
  for (int lane = 0; lane < kVectorLanes; ++lane) {
    p[lane] = FromAcc<BFloat16>::convert(v[lane]);
  }
}
#endif

// One step of a row and a vector of one of the columns, and the sum with their product.
FASTRES_INLINE VectorF broadcast_step(const float* p) { return *p - VectorF{}; }
FASTRES_INLINE VectorF columns_of(const float* p) { return load_vector(p); }
FASTRES_INLINE VectorF add_product(const float*, VectorF a, VectorF b, VectorF sum) {
  return fma_vector(a, b, sum);
}
#if defined(__AVX512BF16__)
FASTRES_INLINE VectorF broadcast_step(const Pair* p) {
  int32_t bits;
  memcpy(&bits, p, sizeof(bits));
  return (VectorF)_mm512_set1_epi32(bits);
}
FASTRES_INLINE VectorF columns_of(const Pair* p) { return (VectorF)_mm512_loadu_si512(p); }
FASTRES_INLINE VectorF add_product(const Pair*, VectorF a, VectorF b, VectorF sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

// sums[i][j] += a[i][k] * b[k][j] over the stretches. Steps of a row are kStep elements apart, rows
// of b `ldb` elements.
template <int kRows, int kVectors, int kStep, class E, class T>
FASTRES_INLINE void multiply(const Tile<E, T>& tile, const Stretch<E>* stretches, int64_t count,
                             int64_t ldb, VectorF (&sums)[kRows][kVectors]) {
  const char* ahead = tile.ahead;
  const int64_t ahead_step = tile.ahead_step;
  for (int64_t s = 0; s < count; ++s) {
    const E* row[kRows];
    FASTRES_UNROLL
    for (int i = 0; i < kRows; ++i) {
      row[i] = tile.a[i] + stretches[s].a;
    }
    const E* b = stretches[s].b;
    const int64_t length = stretches[s].length;
    for (int64_t k = 0; k < length; ++k, b += ldb, ahead += ahead_step) {
      __builtin_prefetch(ahead, 0, 2);
      VectorF column[kVectors];
      FASTRES_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        column[j] = columns_of(b + j * kVectorLanes);
      }
      FASTRES_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const VectorF value = broadcast_step(row[i] + k * kStep);
        FASTRES_UNROLL
        for (int j = 0; j < kVectors; ++j) {
          sums[i][j] = add_product(b, value, column[j], sums[i][j]);
        }
      }
    }
  }
}

// A row of sums becomes a row of c, or is left for the next part of k.
template <int kVectors, class T>
FASTRES_INLINE void end_row(VectorF (&v)[kVectors], T* c, const T* residual, float* parts,
                            const TileEnd<T>& end) {
  const auto each = [&](const auto& f) {
    FASTRES_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      v[j] = f(v[j], j * kVectorLanes);
    }
  };
  const auto put = [&](auto* to) {
    FASTRES_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      store_vector(to + j * kVectorLanes, v[j]);
    }
  };
  if (kInParts<T> && end.from_parts) {
    each([&](VectorF sum, int at) { return sum + load_vector(parts + at); });
  } else if (end.accumulate) {
    each([&](VectorF sum, int at) { return sum + load_vector(c + at); });
  } else if (end.bias) {
    each([&](VectorF sum, int at) { return sum + load_vector(end.bias + at); });
  }
  if (kInParts<T> && end.to_parts) {
    return put(parts);
  }
  if (end.scale) {
    each([&](VectorF sum, int at) {
      return fma_vector(sum, load_vector(end.scale + at), load_vector(end.shift + at));
    });
  }
  if (residual) {
    each([&](VectorF sum, int at) { return sum + load_vector(residual + at); });
  }
  if (end.relu) {
    each([](VectorF sum, int) { return relu_vector(sum); });
  }
  put(c);
}

// The same of rows whose last vector is not whole: all that a row needs and becomes goes through
// rows of our own.
template <class E, class T>
__attribute__((noinline)) void end_part(const Tile<E, T>& tile, const float* sums, int vectors,
                                        TileEnd<T> end) {
  T c[kTileColumns] = {}, bias[kTileColumns] = {}, residual[kTileColumns] = {};
  float scale[kTileColumns] = {}, shift[kTileColumns] = {};
  const auto own = [&](auto*& given, auto& to) {
    if (given) {
      memcpy((void*)to, given, sizeof(to[0]) * size_t(tile.columns));
      given = to;
    }
  };
  own(end.bias, bias);
  own(end.scale, scale);
  own(end.shift, shift);
  for (int i = 0; i < tile.rows; ++i) {
    const T *added = tile.has_residual ? tile.residual[i] : nullptr,
            *before = end.accumulate ? tile.c[i] : nullptr;
    own(added, residual);
    own(before, c);
    for (int j = 0; j < vectors; ++j) {
      const int at = j * kVectorLanes;
      VectorF v[1] = {load_vector(sums + i * vectors * kVectorLanes + at)};
      TileEnd<T> here = end;
      here.bias = end.bias ? bias + at : nullptr;
      here.scale = end.scale ? scale + at : nullptr;
      here.shift = shift + at;
      float* parts = kInParts<T> ? tile.parts[i] + at : nullptr;
      end_row(v, c + at, added ? residual + at : nullptr, parts, here);
    }
    if (!end.to_parts) {
      memcpy((void*)tile.c[i], c, sizeof(T) * size_t(tile.columns));
    }
  }
}

template <int kRows, int kVectors, int kStep, class E, class T>
__attribute__((noinline)) void run_tile(const Tile<E, T>& tile, const Stretch<E>* stretches,
                                        int64_t count, int64_t ldb, const TileEnd<T>& end) {
  VectorF sums[kRows][kVectors];
  FASTRES_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FASTRES_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = VectorF{};
    }
  }
  // Where the sums go is in L1 by then.
  FASTRES_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FASTRES_UNROLL
    for (int j = 0; j < kVectors * kVectorLanes; j += kLine / int(sizeof(T))) {
      __builtin_prefetch(tile.c[i] + j, 1, 3);
    }
  }
  multiply<kRows, kVectors, kStep>(tile, stretches, count, ldb, sums);
  if (tile.columns == kVectors * kVectorLanes) {
    FASTRES_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (kVectors == kTileVectors || i < tile.rows) {
        end_row(sums[i], tile.c[i], tile.has_residual ? tile.residual[i] : nullptr,
                kInParts<T> ? tile.parts[i] : nullptr, end);
      }
    }
    return;
  }
  float memory[kRows * kVectors * kVectorLanes];
  FASTRES_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FASTRES_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      store_vector(memory + (i * kVectors + j) * kVectorLanes, sums[i][j]);
    }
  }
  end_part(tile, memory, kVectors, end);
}

template <class E = float, class T = float>
using RunTile = void (*)(const Tile<E, T>&, const Stretch<E>*, int64_t, int64_t, const TileEnd<T>&);

// The instance for so many rows and columns. With fewer columns than a whole tile there is one for
// all rows: those that do not exist must have addresses that can be read.
template <int kStep, class E = float, class T = float>
FASTRES_INLINE RunTile<E, T> tile_for(int rows, int columns) {
  static constexpr RunTile<E, T> kByRows[] = {
      run_tile<1, kTileVectors, kStep, E, T>, run_tile<2, kTileVectors, kStep, E, T>,
      run_tile<3, kTileVectors, kStep, E, T>, run_tile<4, kTileVectors, kStep, E, T>,
      run_tile<5, kTileVectors, kStep, E, T>, run_tile<6, kTileVectors, kStep, E, T>};
  const int vectors = (columns + kVectorLanes - 1) / kVectorLanes;
  if (vectors == kTileVectors) {
    return kByRows[rows - 1];
  }
  static constexpr RunTile<E, T> kByVectors[] = {
      run_tile<kTileRows, 1, kStep, E, T>,
#if defined(__AVX512F__)
      run_tile<kTileRows, 2, kStep, E, T>,
      run_tile<kTileRows, 3, kStep, E, T>,
#endif
  };
  return kByVectors[vectors - 1];
}

}  // namespace fastres::cpu::FASTRES_ISA
