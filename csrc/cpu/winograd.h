// Convolutions by three by three taps in steps of one, in 16 multiplications for 36: Winograd's
// F(2x2, 3x3), as in Lavin and Gray, 2015.
//
// A square of two by two output pixels is A^T [(G g G^T) * (B^T d B)] A of the taps g and the four
// by four source pixels d that it reads, * being element by element: for each of 16 points a
// product of matrices over the channels. A panel is a few lines of squares; its d are transformed
// once, and every block of the transformed weight is multiplied by all of them, point by point,
// before the sums are transformed back.
#pragma once

#include <memory>

#include "cpu/convolve.h"

namespace fastres::cpu::FASTRES_ISA {

inline constexpr int kPoints = 16;
// Floats of a panel, transformed and multiplied by a block of the weight: with one point's block
// they fit L2.
inline constexpr int64_t kPointFloats = 192 * 1024;
inline constexpr int64_t kFewestSquares = 30;
// What a panel costs beside its tiles, in tiles: reading the weight.
inline constexpr int64_t kTilesOfPanel = 1;

// ---- what is transformed ----

// A panel is computed by squares unless its values are of a kind whose rounding errors would show.
// Sums of ordinary ones come out closer to the truth than without squares. But a value that dwarfs
// all others errs wherever its squares reach, more than a single product does; where nearly all
// values are zero, a sum has so few terms that it hardly rounds without squares; and NaN and
// infinity must reach no pixel but their own.
inline constexpr float kLargestSquare = 2000;    // of a value, in mean squares
inline constexpr float kLargestShare = 1 / 6.f;  // of a value's square in the sum of all
inline constexpr float kFewestNonzero = 1 / 12.f;
// Likewise for the weights of a column: at most so many of them are zero, and the fourth powers are
// no larger against the squares.
inline constexpr double kFewestWeights = 1 / 2.;
inline constexpr double kLargestFourth = 128;
// Products, and sums of them, stay this far from infinity.
inline constexpr double kLargestProduct = 1e33;

// What stands behind the blocks of a transformed weight, once per block of columns.
struct BlockOfPoints {
  float fits;     // 1 or 0
  float largest;  // sum of a column's squares
};

// [blocks of columns, points, k of the sum, column], and a `BlockOfPoints` for each block.
struct PointWeight {
  int64_t columns, depth;

  int64_t blocks() const { return ceil_div(columns, kTileColumns); }
  int64_t floats() const { return kPoints * depth * kTileColumns * blocks(); }
  int64_t size() const { return floats() + blocks() * 2; }
  BlockOfPoints block(const float* packed, int64_t i) const {
    const float* at = packed + floats() + 2 * i;
    return {at[0], at[1]};
  }
  bool fits(const float* packed) const {
    bool all = true;
    for (int64_t i = 0; i < blocks(); ++i) {
      all = all && block(packed, i).fits == 1;
    }
    return all;
  }
  double largest(const float* packed) const {
    double most = 0;
    for (int64_t i = 0; i < blocks(); ++i) {
      most = std::max(most, double(block(packed, i).largest));
    }
    return most;
  }
};

// What tells of values whether squares serve them.
struct Values {
  double squares;  // their sum, in which NaN and infinity show
  double largest;  // square
  double nonzero;
};

inline Values look_at(const float* p, const float* end) {
  Pack<float> most = broadcast(0.0f), squares[2] = {most, most}, nonzero = most;
  const auto add = [&](const Pack<float>& v, Pack<float>& sum) {
    const Pack<float> square = v * v;
    most = select(less(most, square), square, most);
    sum = sum + square;
    nonzero = nonzero + keep(less(broadcast(0.0f), square), broadcast(1.0f));
  };
  for (; p + 2 * kPack <= end; p += 2 * kPack) {
    add(load(p, Full{}), squares[0]);
    add(load(p + kPack, Full{}), squares[1]);
  }
  for (; p < end; p += kPack) {
    const Part rest{int(at_most(kPack, end - p))};
    add(existing(rest, load(p, rest)), squares[0]);
  }
  float lanes[kPack], largest = 0;
  store(lanes, most, Full{});
  for (float value : lanes) {
    largest = std::max(largest, value);
  }
  return {horizontal_sum(widen(squares[0] + squares[1])), largest, horizontal_sum(widen(nonzero))};
}

// So many values, to be multiplied by others whose squares are no larger than `other`.
inline bool serve(const Values& found, double values, double other) {
  constexpr double kLargestSum = 3e38;
  return found.squares == 0 || (found.squares <= kLargestSum &&
                                found.largest * other <= kLargestProduct * kLargestProduct &&
                                found.largest <= found.squares * kLargestShare &&
                                found.largest * values <= found.squares * kLargestSquare &&
                                found.nonzero >= values * kFewestNonzero);
}

// B^T d B.
template <class Lanes>
FASTRES_INLINE void transform_source(const float* from, int64_t pitch, int64_t channels, float* to,
                                     int64_t point, Lanes lanes) {
  Pack<float> t[4][4];
  FASTRES_UNROLL
  for (int q = 0; q < 4; ++q) {
    Pack<float> d[4];
    FASTRES_UNROLL
    for (int r = 0; r < 4; ++r) {
      d[r] = load(from + r * pitch + q * channels, lanes);
    }
    t[0][q] = d[0] - d[2];
    t[1][q] = d[1] + d[2];
    t[2][q] = d[2] - d[1];
    t[3][q] = d[1] - d[3];
  }
  FASTRES_UNROLL
  for (int r = 0; r < 4; ++r) {
    float* row = to + 4 * r * point;
    store(row, t[r][0] - t[r][2], lanes);
    store(row + point, t[r][1] + t[r][2], lanes);
    store(row + 2 * point, t[r][2] - t[r][1], lanes);
    store(row + 3 * point, t[r][1] - t[r][3], lanes);
  }
}

// The squares of lines of a band, to [points, squares, channels].
inline void transform_band(const Sweep& s, const Band<>& band, Range lines, int64_t channels,
                           float* to, int64_t point) {
  for (int64_t line = lines.begin; line < lines.end; ++line) {
    const float* from = band.line(line);
    for (int64_t j = 0; j < s.phases[0].pixels; ++j, from += 2 * channels, to += channels) {
      int64_t col = 0;
      for (; col + kPack <= channels; col += kPack) {
        transform_source(from + col, band.pitch(), channels, to + col, point, Full{});
      }
      if (col < channels) {
        transform_source(from + col, band.pitch(), channels, to + col, point,
                         Part{int(channels - col)});
      }
    }
  }
}

// Points apart by so many floats that their rows do not meet in the same lines of L1.
inline int64_t points_apart(int64_t floats) { return round_up(floats, 1024) + 80; }

// The line of a sweep at which one of squares begins.
inline int64_t line_of_squares(const Sweep& squares, const Sweep& s, int64_t line) {
  return line / squares.lines * s.lines + at_most(line % squares.lines * 2, s.lines);
}

// ---- one worker's squares ----

class WinogradSweeper {
 public:
  // As many lines as fit L2, or fewer where that leaves fewer rows of tiles empty: panels are of
  // equal size as far as lines allow.
  static PanelCut cut(const Sweep& s) {
    const int64_t width = at_least(1, s.phases[0].pixels), total = s.n * s.lines;
    const int64_t tiles = wide(s) ? kPointFloats / 4 / s.in_c : fitting(s);
    const int64_t least = ceil_div(total, at_least(1, tiles / width));
    PanelCut best(at_least(1, total), 0);
    int64_t fewest = INT64_MAX;
    for (int64_t panels = least; panels <= least + least / 2; ++panels) {
      const int64_t lines = ceil_div(total, at_least(1, panels)),
                    whole = total / at_least(1, lines);
      const int64_t all = whole * (ceil_div(lines * width, kTileRows) + kTilesOfPanel) +
                          ceil_div((total - whole * lines) * width, kTileRows);
      if (all < fewest) {
        fewest = all;
        best = {lines, ceil_div(total, lines)};
      }
    }
    return best;
  }

  WinogradSweeper(const Sweep& s, const SweepArgs<>& args, const PanelCut& cut)
      : s_(s),
        args_(args),
        wide_(wide(s)),
        lines_(cut.lines),
        tiles_(cut.lines * s.phases[0].pixels),
        point_(points_apart(tiles_ * s.in_c)),
        sums_point_(points_apart(tiles_ * kTileColumns)),
        largest_(PointWeight{s.out_c, s.in_c}.largest(args.packed)),
        band_(s, cut.lines, s.in_c),
        transformed_(kPoints * point_),
        sums_(kPoints * sums_point_ * (wide_ ? ceil_div(s.out_c, kTileColumns) : 1)) {}

  void form(Range lines) {
    band_.form(args_.source, lines, {0, s_.in_c});
    count_ = (lines.end - lines.begin) * s_.phases[0].pixels;
    const double values = double(count_ * 4 * s_.in_c);
    fits_ = serve(look_at(band_.begin(), band_.end()), values, largest_);
    if (fits_) {
      transform_band(s_, band_, lines, s_.in_c, transformed_.data(), point_);
    }
  }

  void look_ahead(Range rows, Range columns, Range next) {
    ask_for_next(s_, args_, rows, next, ahead_);
    const int64_t free = at_least(1, ceil_div(count_, kTileRows) - kTilesForWeight);
    ahead_.spread(kPoints * free * ceil_div(columns.end - columns.begin, kTileColumns));
  }

  void multiply(Range lines, Range columns) {
    if (!fits_) {
      multiply_directly(lines, columns);
      return;
    }
    // The weight point by point for all columns, or for one block of them after the other.
    const int64_t stretch = wide_ ? columns.end - columns.begin : kTileColumns;
    for (int64_t first = columns.begin; first < columns.end; first += stretch) {
      const int64_t end = at_most(first + stretch, columns.end);
      for (int point = 0; point < kPoints; ++point) {
        for (int64_t col = first; col < end; col += kTileColumns) {
          multiply_point(point, {first, end}, col, columns);
        }
      }
      for (int64_t col = first; col < end; col += kTileColumns) {
        finish(lines, col, int(at_most(kTileColumns, end - col)), sums(first, col, 0));
      }
    }
  }

 private:
  // So many of a point's tiles ask for the weight of the next one, the others for pixels.
  static constexpr int64_t kTilesForWeight = 4;

  // Squares that fit L2 with all of their points.
  static int64_t fitting(const Sweep& s) {
    return kPointFloats / (kPoints * (s.in_c + kTileColumns));
  }
  // Where those would be too few for the weight that they share, more are taken, of which one point
  // fits.
  static bool wide(const Sweep& s) { return fitting(s) < kFewestSquares; }

  const float* weight(int64_t col, int point) const {
    return args_.packed + (col / kTileColumns * kPoints + point) * s_.in_c * kTileColumns;
  }

  float* sums(int64_t first, int64_t col, int point) const {
    return sums_.data() + ((col - first) / kTileColumns * kPoints + point) * sums_point_;
  }

  // The weight that is read behind that of a point and a block.
  const float* weight_behind(Range block, int64_t col, int point, Range columns) const {
    if (col + kTileColumns < block.end) {
      return weight(col + kTileColumns, point);
    }
    if (point + 1 < kPoints) {
      return weight(block.begin, point + 1);
    }
    return weight(block.end < columns.end ? block.end : columns.begin, 0);
  }

  void multiply_point(int point, Range block, int64_t col, Range columns) {
    const int width = int(at_most(kTileColumns, block.end - col));
    const float* next = weight_behind(block, col, point, columns);
    const int64_t depth = s_.in_c, parts = ceil_div(depth, kDepth), part = ceil_div(depth, parts);
    const float* b = weight(col, point);
    float* to = sums(block.begin, col, point);
    Tile<> tile{};
    tile.columns = int(round_up(width, kVectorLanes));
    const RunTile<> last = tile_for<1>(int((count_ - 1) % kTileRows) + 1, width);
    const RunTile<> full = tile_for<1>(kTileRows, width);
    for (int64_t k = 0; k < depth; k += part) {
      const Stretch stretch{k, b + k * kTileColumns, at_most(part, depth - k), 0};
      const TileEnd<> end{k > 0, nullptr, nullptr, nullptr, false};
      const char* ahead = (const char*)(next + k * kTileColumns);
      const int64_t ahead_step =
          kTileColumns * sizeof(float) / at_most(kTilesForWeight, ceil_div(count_, kTileRows));
      for (int64_t t = 0; t < count_; t += kTileRows) {
        tile.rows = int(at_most(kTileRows, count_ - t));
        for (int i = 0; i < kTileRows; ++i) {
          const int64_t at = t + at_most(i, tile.rows - 1);
          tile.a[i] = transformed_.data() + point * point_ + at * depth;
          tile.c[i] = to + at * kTileColumns;
        }
        if (t < kTilesForWeight * kTileRows) {
          tile.ahead = ahead;
          tile.ahead_step = ahead_step;
          ahead += ahead_step * stretch.length;
        } else {
          ahead_.give(tile, stretch.length);
        }
        (tile.rows == kTileRows ? full : last)(tile, &stretch, 1, kTileColumns, end);
      }
    }
  }

  // Behind the products of a block of columns: each square's pixels, as far as they exist.
  void finish(Range lines, int64_t col, int width, const float* from) const {
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const int64_t image = line / s_.lines, top = line % s_.lines * 2;
      const int rows = int(at_most(2, s_.out_h - top));
      const int64_t row = ((image * s_.out_h + top) * s_.out_w) * s_.out_c + col;
      for (int64_t j = 0; j < s_.phases[0].pixels; ++j, from += kTileColumns) {
        const int columns = int(at_most(2, s_.out_w - 2 * j));
        const int64_t to = row + 2 * j * s_.out_c;
        int i = 0;
        for (; i + kPack <= width; i += kPack) {
          finish_square(from + i, to + i, col + i, rows, columns, Full{});
        }
        if (i < width) {
          finish_square(from + i, to + i, col + i, rows, columns, Part{width - i});
        }
      }
    }
  }

  // A^T m A.
  template <class Lanes>
  FASTRES_INLINE void finish_square(const float* from, int64_t to, int64_t col, int rows,
                                    int columns, Lanes lanes) const {
    Pack<float> t[2][4];
    FASTRES_UNROLL
    for (int q = 0; q < 4; ++q) {
      Pack<float> m[4];
      FASTRES_UNROLL
      for (int r = 0; r < 4; ++r) {
        m[r] = load(from + (4 * r + q) * sums_point_, Full{});
      }
      t[0][q] = m[0] + m[1] + m[2];
      t[1][q] = m[1] - m[2] - m[3];
    }
    FASTRES_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (r < rows) {
        const int64_t at = to + r * s_.out_w * s_.out_c;
        put(t[r][0] + t[r][1] + t[r][2], at, col, lanes);
        if (columns > 1) {
          put(t[r][1] - t[r][2] - t[r][3], at + s_.out_c, col, lanes);
        }
      }
    }
  }

  // As the end of a register tile.
  template <class Lanes>
  FASTRES_INLINE void put(Pack<float> v, int64_t to, int64_t col, Lanes lanes) const {
    if (args_.accumulate) {
      v = v + load(args_.out + to, lanes);
    } else if (args_.bias) {
      v = v + load(args_.bias + col, lanes);
    }
    if (args_.scale) {
      v = fma(v, load(args_.scale + col, lanes), load(args_.shift + col, lanes));
    }
    if (args_.residual) {
      v = v + load(args_.residual + to, lanes);
    }
    if (args_.relu) {
      v = relu(v);
    }
    store(args_.out + to, v, lanes);
  }

  void multiply_directly(Range lines, Range columns) {
    const Sweep& s = *args_.direct;
    if (!direct_) {
      direct_args_ = std::make_unique<SweepArgs<>>(args_);
      direct_args_->packed = nullptr;
      direct_ = std::make_unique<Sweeper<>>(s, *direct_args_, PanelCut(2 * lines_, 0));
    }
    const Range own{line_of_squares(s_, s, lines.begin), line_of_squares(s_, s, lines.end)};
    direct_->form(own);
    direct_->multiply(own, columns);
  }

  const Sweep& s_;
  const SweepArgs<>& args_;
  bool wide_;
  int64_t lines_, tiles_, point_, sums_point_;
  double largest_;
  Band<> band_;
  Scratch<float> transformed_, sums_;
  Ahead ahead_;
  int64_t count_ = 0;
  bool fits_ = false;
  std::unique_ptr<SweepArgs<>> direct_args_;
  std::unique_ptr<Sweeper<>> direct_;
};

}  // namespace fastres::cpu::FASTRES_ISA
