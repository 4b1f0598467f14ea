// A register tile of a matrix product, the core of every convolution here.
//
// Up to kTileRows rows of one operand are read element by element and broadcast; kTileColumns
// columns of the other are read as whole vectors; the sums stay in registers over the whole of k.
#pragma once

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
inline constexpr int kTileColumns = kTileVectors * kVectorLanes;

// A stretch of k: `length` steps from a row's own address plus `a`, and from `b`; of a weight, it
// begins at `step`.
struct Stretch {
  int64_t a;
  const float* b;
  int64_t length;
  int64_t step;
};

FASTRES_INLINE int64_t depth_of(const Stretch* stretches, int64_t count) {
  int64_t depth = 0;
  for (int64_t i = 0; i < count; ++i) {
    depth += stretches[i].length;
  }
  return depth;
}

// What becomes of the sums of a tile.
struct TileEnd {
  bool accumulate;     // they start with what stands in c
  const float* bias;   // else with this per column, or zero where it is null
  const float* scale;  // per column: scale * sum + shift, or null
  const float* shift;
  bool relu;  // after that, and after the residual
};

struct Tile {
  const float* a[kTileRows];
  float* c[kTileRows];
  const float* residual[kTileRows];  // added where `has_residual`
  bool has_residual;
  const char* ahead;  // memory that is asked for on the way, `ahead_step` bytes in each step of k
  int64_t ahead_step;
  int rows;     // of c that are written
  int columns;  // likewise
};

FASTRES_INLINE VectorF load_vector(const float* p) { return *(const MemoryF*)p; }
FASTRES_INLINE void store_vector(float* p, VectorF v) { *(MemoryF*)p = v; }

// sums[i][j] += a[i][k] * b[k][j] over the stretches. Steps of a row are kStep elements apart, rows
// of b `ldb` elements.
template <int kRows, int kVectors, int kStep>
FASTRES_INLINE void multiply(const Tile& tile, const Stretch* stretches, int64_t count, int64_t ldb,
                             VectorF (&sums)[kRows][kVectors]) {
  const char* ahead = tile.ahead;
  const int64_t ahead_step = tile.ahead_step;
  for (int64_t s = 0; s < count; ++s) {
    const float* row[kRows];
    FASTRES_UNROLL
    for (int i = 0; i < kRows; ++i) {
      row[i] = tile.a[i] + stretches[s].a;
    }
    const float* b = stretches[s].b;
    const int64_t length = stretches[s].length;
    for (int64_t k = 0; k < length; ++k, b += ldb, ahead += ahead_step) {
      __builtin_prefetch(ahead, 0, 2);
      VectorF column[kVectors];
      FASTRES_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        column[j] = load_vector(b + j * kVectorLanes);
      }
      FASTRES_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const VectorF value = row[i][k * kStep] - VectorF{};
        FASTRES_UNROLL
        for (int j = 0; j < kVectors; ++j) {
          sums[i][j] = fma_vector(value, column[j], sums[i][j]);
        }
      }
    }
  }
}

// A row of sums becomes a row of c.
template <int kVectors>
FASTRES_INLINE void end_row(VectorF (&v)[kVectors], float* c, const float* residual,
                            const TileEnd& end) {
  const auto each = [&](const auto& f) {
    FASTRES_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      v[j] = f(v[j], j * kVectorLanes);
    }
  };
  if (end.accumulate) {
    each([&](VectorF sum, int at) { return sum + load_vector(c + at); });
  } else if (end.bias) {
    each([&](VectorF sum, int at) { return sum + load_vector(end.bias + at); });
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
  FASTRES_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    store_vector(c + j * kVectorLanes, v[j]);
  }
}

// The same of rows whose last vector is not whole: all that a row needs and becomes goes through
// rows of our own.
inline __attribute__((noinline)) void end_part(const Tile& tile, const float* sums, int vectors,
                                               TileEnd end) {
  const size_t bytes = sizeof(float) * size_t(tile.columns);
  float c[kTileColumns] = {}, bias[kTileColumns] = {}, scale[kTileColumns] = {},
        shift[kTileColumns] = {}, residual[kTileColumns] = {};
  const auto own = [&](const float*& given, float (&to)[kTileColumns]) {
    if (given) {
      memcpy(to, given, bytes);
      given = to;
    }
  };
  own(end.bias, bias);
  own(end.scale, scale);
  own(end.shift, shift);
  for (int i = 0; i < tile.rows; ++i) {
    const float* added = tile.has_residual ? tile.residual[i] : nullptr;
    own(added, residual);
    memcpy(c, tile.c[i], end.accumulate ? bytes : 0);
    for (int j = 0; j < vectors; ++j) {
      const int at = j * kVectorLanes;
      VectorF v[1] = {load_vector(sums + i * vectors * kVectorLanes + at)};
      const TileEnd here{end.accumulate, end.bias ? bias + at : nullptr,
                         end.scale ? scale + at : nullptr, shift + at, end.relu};
      end_row(v, c + at, added ? residual + at : nullptr, here);
    }
    memcpy(tile.c[i], c, bytes);
  }
}

template <int kRows, int kVectors, int kStep>
__attribute__((noinline)) void run_tile(const Tile& tile, const Stretch* stretches, int64_t count,
                                        int64_t ldb, const TileEnd& end) {
  VectorF sums[kRows][kVectors];
  FASTRES_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FASTRES_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = VectorF{};
    }
  }
  multiply<kRows, kVectors, kStep>(tile, stretches, count, ldb, sums);
  if (tile.columns == kVectors * kVectorLanes) {
    FASTRES_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (kVectors == kTileVectors || i < tile.rows) {
        end_row(sums[i], tile.c[i], tile.has_residual ? tile.residual[i] : nullptr, end);
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

using RunTile = void (*)(const Tile&, const Stretch*, int64_t, int64_t, const TileEnd&);

// The instance for so many rows and columns. With fewer columns than a whole tile there is one for
// all rows: those that do not exist must have addresses that can be read.
template <int kStep>
FASTRES_INLINE RunTile tile_for(int rows, int columns) {
  static constexpr RunTile kByRows[] = {
      run_tile<1, kTileVectors, kStep>, run_tile<2, kTileVectors, kStep>,
      run_tile<3, kTileVectors, kStep>, run_tile<4, kTileVectors, kStep>,
      run_tile<5, kTileVectors, kStep>, run_tile<6, kTileVectors, kStep>};
  const int vectors = (columns + kVectorLanes - 1) / kVectorLanes;
  if (vectors == kTileVectors) {
    return kByRows[rows - 1];
  }
  static constexpr RunTile kByVectors[] = {
      run_tile<kTileRows, 1, kStep>,
#if defined(__AVX512F__)
      run_tile<kTileRows, 2, kStep>,
      run_tile<kTileRows, 3, kStep>,
#endif
  };
  return kByVectors[vectors - 1];
}

}  // namespace fastres::cpu::FASTRES_ISA
