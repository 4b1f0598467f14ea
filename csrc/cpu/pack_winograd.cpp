// Weights of three by three taps, transformed: G g G^T.
#include "cpu/table.h"
#include "cpu/winograd.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

// Steps of k at a time: what lines of the weight hold of other steps is still in L1 then.
constexpr int64_t kSteps = 16;
constexpr int kTaps = 9;

// Of each column of a block: values that are not zero, sums of second and of fourth powers.
struct ColumnSums {
  float nonzero[kTileColumns], squares[kTileColumns], fourths[kTileColumns];
};

// A column's part of G g G^T: rows of three taps to rows of four points.
FASTRES_INLINE void transform_taps(const Pack<float> (&g)[3], Pack<float> (&u)[4]) {
  const Pack<float> half = broadcast(0.5f), outer = g[0] + g[2];
  u[0] = g[0];
  u[1] = half * (outer + g[1]);
  u[2] = half * (outer - g[1]);
  u[3] = g[2];
}

class Packer {
 public:
  WeightView<> view;
  bool turned;  // the data gradient reads the taps from the last to the first
  float* packed;

  // Steps [begin, end) of a block of columns.
  void pack(int64_t block, Range steps, float* taps, ColumnSums& sums) const {
    for (int tap = 0; tap < kTaps; ++tap) {
      const int64_t first = (turned ? kTaps - 1 - tap : tap) * view.depth;
      view.pack(block * kTileColumns, {first + steps.begin, first + steps.end},
                taps + tap * kSteps * kTileColumns);
    }
    const int64_t count = steps.end - steps.begin;
    float* to = packed + (block * kPoints * view.depth + steps.begin) * kTileColumns;
    for (int64_t col = 0; col < kTileColumns; col += kPack) {
      if constexpr (kTileColumns % kPack == 0) {
        transform(taps + col, to + col, count, sums, col, Full{});
      } else {
        transform(taps + col, to + col, count, sums, col, Part{kTileColumns});
      }
    }
  }

 private:
  template <class Lanes>
  FASTRES_INLINE void transform(const float* from, float* to, int64_t count, ColumnSums& sums,
                                int64_t col, Lanes lanes) const {
    const int64_t point = view.depth * kTileColumns;
    Pack<float> nonzero = broadcast(0.0f), squares = nonzero, fourths = nonzero;
    for (int64_t k = 0; k < count; ++k, from += kTileColumns, to += kTileColumns) {
      Pack<float> t[3][4], u[4];
      FASTRES_UNROLL
      for (int q = 0; q < 3; ++q) {
        Pack<float> g[3];
        FASTRES_UNROLL
        for (int r = 0; r < 3; ++r) {
          g[r] = load(from + (3 * r + q) * kSteps * kTileColumns, lanes);
          const Pack<float> square = g[r] * g[r];
          nonzero = nonzero + keep(less(broadcast(0.0f), square), broadcast(1.0f));
          squares = squares + square;
          fourths = fma(square, square, fourths);
        }
        transform_taps(g, t[q]);
      }
      FASTRES_UNROLL
      for (int r = 0; r < 4; ++r) {
        const Pack<float> row[3] = {t[0][r], t[1][r], t[2][r]};
        transform_taps(row, u);
        FASTRES_UNROLL
        for (int q = 0; q < 4; ++q) {
          store(to + (4 * r + q) * point, u[q], lanes);
        }
      }
    }
    store(sums.nonzero + col, nonzero, lanes);
    store(sums.squares + col, squares, lanes);
    store(sums.fourths + col, fourths, lanes);
  }
};

// What is known of a block from the sums of its parts.
BlockOfPoints judge(const ColumnSums* parts, int64_t count, double values) {
  BlockOfPoints found{1, 0};
  for (int64_t col = 0; col < kTileColumns; ++col) {
    double nonzero = 0, squares = 0, fourths = 0;
    for (int64_t i = 0; i < count; ++i) {
      nonzero += double(parts[i].nonzero[col]);
      squares += double(parts[i].squares[col]);
      fourths += double(parts[i].fourths[col]);
    }
    // NaN and infinity are in the sums, and make one of these false.
    const bool fits = squares == 0 || (nonzero >= values * kFewestWeights &&
                                       fourths * values <= kLargestFourth * squares * squares);
    found.fits = fits ? found.fits : 0.0f;
    found.largest = std::max(found.largest, float(squares));
  }
  return found;
}

}  // namespace

int64_t winograd_size(const ConvShape& s, bool transposed) {
  return PointWeight{transposed ? s.c : s.k, transposed ? s.k : s.c}.size();
}

void pack_winograd(const PackWeightArgs& a) {
  const Packer packer{WeightView<>(a.weight, a.shape, a.transposed), a.transposed,
                      (float*)a.packed};
  const WeightView<>& view = packer.view;
  const PointWeight weight{view.columns, view.depth};
  const int64_t blocks = weight.blocks(), parts = ceil_div(view.depth, kSteps);
  const Scratch<ColumnSums> sums(blocks * parts);
  parallel(a.threads, weight.size() * int64_t(sizeof(float)), [&](Worker worker) {
    const Scratch<float> taps(kTaps * kSteps * kTileColumns);
    const Range tasks = worker.share(blocks * parts);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t begin = task % parts * kSteps;
      packer.pack(task / parts, {begin, at_most(begin + kSteps, view.depth)}, taps.data(),
                  sums.data()[task]);
    }
    worker.wait_for_all();
    const Range own = worker.share(blocks);
    for (int64_t block = own.begin; block < own.end; ++block) {
      const BlockOfPoints found =
          judge(sums.data() + block * parts, parts, double(kTaps * view.depth));
      float* to = packer.packed + weight.floats() + 2 * block;
      to[0] = found.fits;
      to[1] = found.largest;
    }
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
