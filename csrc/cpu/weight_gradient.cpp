// grad_weight[k, tap, c] = sum over pixels of grad_y[pixel, k] * input[pixel + tap, c].
//
// The sum runs over pixels: a tile's rows are output channels, its columns input channels. A panel
// of pixels is formed once: the gradient in blocks of 16 channels, the input as a band of as many
// as a tile has columns.
#include "cpu/convolve.h"
#include "cpu/table.h"
#include "cpu/winograd.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

// Output channels that lie side by side: a cache line of them.
constexpr int64_t kRowBlock = 16;
constexpr int kRowsOfTiles[] = {6, 5, 5};
// Pixels of a panel: as many as two panels of both operands have room for in L2, within bounds;
// with fewer, loading and storing the sums would show. A result that itself is larger than L2 is
// read and written with each panel: there are few then.
constexpr int64_t kBothFloats = 64 * 1024;
constexpr int64_t kFewest = 112, kMost = 448;
constexpr int64_t kLargeResult = 512 * 1024;
// Partial results over groups of panels take this much at most.
constexpr int64_t kPartialFloats = 512 * 1024;
constexpr int64_t kMostGroups = 16;

// Pixels summed up in registers at a time: an eighth of all, within bounds. The error of a longer
// sum shows, the more so the fewer the parts are.
constexpr int64_t kFewestAtOnce = 32, kMostAtOnce = 128;
// Pairs of pixels that lie side by side at a time: with the rows of the other operand they fit L1.
constexpr int64_t kPairsAtOnce = 96;

// Columns of the result that one tile has: where they begin in a band and in a row of the result.
struct Segment {
  int64_t band, out, width;
};

template <class T = float>
struct WeightJob {
  using Input = Source<Formed<Operand<T>>>;
  const ConvShape& shape;
  Sweep sweep;
  const Input &input, &grad;
  T* result;
  int64_t row_floats;  // of one output channel
  int64_t lines, panels, groups;
  int64_t depth;  // pixels summed up at a time

  WeightJob(const ConvShape& s, const Input& input, const Input& grad, T* result)
      : shape(s), sweep(forward_sweep(s)), input(input), grad(grad), result(result) {
    row_floats = s.taps() * s.c;
    const int64_t total = sweep.n * sweep.lines;
    const int64_t fitting = at_least(kFewest, kBothFloats / (s.c + s.k));
    const int64_t pixels = size() > kLargeResult ? kMost : at_most(kMost, fitting);
    lines = at_least(1, pixels / at_least(1, sweep.out_w));
    lines = at_least(1, ceil_div(total, at_least(1, ceil_div(total, lines))));
    panels = ceil_div(total, lines);
    depth = at_most(kMostAtOnce, at_least(kFewestAtOnce, total * sweep.out_w / 8));
    groups = at_most(kMostGroups, kPartialFloats / at_least(1, s.k * row_floats));
    groups = at_least(1, at_most(groups, panels));
  }

  int64_t channels() const { return at_most(shape.c, kTileColumns); }
  int64_t size() const { return shape.k * row_floats; }
  // Values of a pixel that lie together, and how many lines of taps have room in a tile.
  int64_t line_floats() const { return shape.kw * shape.c; }
  int64_t tap_lines() const {
    const int64_t fitting = shape.dw == 1 ? kTileColumns / line_floats() : 0;
    return at_most(fitting, shape.kh);
  }
  Range panels_of(int64_t group) const {
    return {panels * group / groups, panels * (group + 1) / groups};
  }
};

#if defined(__AVX512BF16__)
// Two rows of values as pairs; beside those of a last one without a second stand zeros. Whole packs
// are written.
FASTRES_INLINE void pair_rows(const BFloat16* first, const BFloat16* second, int64_t count,
                              Pair* to) {
  const auto visit = [&](int64_t i, auto lanes) {
    __m512i pairs = _mm512_cvtepu16_epi32(load_16bit(first + i, lanes));
    if (second) {
      const __m512i words = _mm512_cvtepu16_epi32(load_16bit(second + i, lanes));
      pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(words, 16));
    }
    _mm512_storeu_si512(to + i, pairs);
  };
  int64_t i = 0;
  for (; i + kPack <= count; i += kPack) {
    visit(i, Full{});
  }
  if (i < count) {
    visit(i, Part{int(count - i)});
  }
}
#endif

template <class T = float>
class WeightWorker {
  using E = Operand<T>;
  using F = Formed<E>;
  static constexpr bool kPairs = kPerStep<E> > 1;
  static constexpr int64_t kFormedAtOnce = kRowBlock * kPerStep<E>;  // a cache line of them

 public:
  explicit WeightWorker(const WeightJob<T>& job)
      : job_(job),
        band_(job.sweep, job.lines, job.channels()),
        gradient_(round_up(job.shape.k, kRowBlock) * steps_of<E>(job.lines * job.sweep.out_w)),
        values_(kPairs ? kFormedAtOnce * job.lines * job.sweep.out_w : 0),
        columns_(kPairs ? kTileColumns * kPairsAtOnce : 0),
        // Tiles read whole vectors, beyond the last pixel too.
        gathered_(gathers() ? job.row_floats * job.lines * job.sweep.out_w + kTileColumns : 0) {}

  // Rows [begin, end) of the result over the panels of a group.
  void run(Range panels, Range rows, float* out) {
    const Sweep& s = job_.sweep;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      look_ahead(panel + 1 < panels.end ? panel + 1 : -1, rows);
      const Range lines{panel * job_.lines, at_most((panel + 1) * job_.lines, s.n * s.lines)};
      add(lines, rows, panel > panels.begin, out);
    }
  }

  // Rows [begin, end) of the result over at most as many lines as a panel has.
  void add(Range lines, Range rows, bool accumulate, float* out) {
    form_gradient(lines, rows);
    for (int64_t c = 0; c < job_.sweep.in_c; c += kTileColumns) {
      const Range columns{c, at_most(c + kTileColumns, job_.sweep.in_c)};
      band_.form(job_.input, lines, columns);
      if (gathers()) {
        gather(lines);
      }
      if constexpr (kPairs) {
        locate(lines);
      }
      for (const Segment& segment : segments(columns)) {
        multiply(lines, rows, segment, accumulate, out);
      }
    }
  }

 private:
  // Whether all that a pixel's taps read is laid side by side: with so few channels that several
  // lines of taps fit a tile.
  bool gathers() const { return job_.tap_lines() > 1; }
  // Whether lines are of one pixel.
  bool is_product() const {
    const Sweep& s = job_.sweep;
    return s.in_w == 1 && s.in_step_h == 1 && s.n == 1;
  }
  // Values from a pixel to the next one.
  int64_t pixel_step() const {
    return gathers() ? job_.row_floats : job_.sweep.in_step_w * job_.channels();
  }

  void gather(Range lines) {
    const Sweep& s = job_.sweep;
    const int64_t width = job_.line_floats(), step = s.in_step_w * s.in_c;
    F* to = gathered_.data();
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const F* from = band_.line(line);
      for (int64_t pixel = 0; pixel < s.out_w; ++pixel, from += step) {
        for (int64_t tap = 0; tap < job_.shape.kh; ++tap, to += width) {
          copy_few(from + tap * job_.shape.dh * band_.pitch(), to, width);
        }
      }
    }
  }

  static void copy_few(const F* from, F* to, int64_t count) {
    int64_t i = 0;
    for (; i + kPack <= count; i += kPack) {
      store(to + i, load(from + i, Full{}), Full{});
    }
    if (i < count) {
      const Part rest{int(count - i)};
      store(to + i, load(from + i, rest), rest);
    }
  }

  void form_gradient(Range lines, Range rows) {
    const int64_t width = job_.sweep.out_w;
    pixels_ = (lines.end - lines.begin) * width;
    steps_ = steps_of<E>(pixels_);
    const Range pixels{lines.begin * width, lines.end * width};
    for (int64_t k = rows.begin; k < rows.end; k += kFormedAtOnce) {
      const Range channels{k, at_most(k + kFormedAtOnce, rows.end)};
      E* to = gradient_.data() + (k - rows.begin) * steps_;
      if constexpr (kPairs) {
        job_.grad.form(pixels, channels, values_.data(), kFormedAtOnce, kFormedAtOnce);
        for (int64_t i = 0; i < channels.end - k; i += kRowBlock, to += steps_ * kRowBlock) {
          pair_block(values_.data() + i, to);
        }
      } else {
        job_.grad.form(pixels, channels, to, kRowBlock, kRowBlock);
      }
    }
  }

  // A block of channels of the panel's pixels, as pairs of neighbours.
  void pair_block(const F* from, E* to) const {
    for (int64_t p = 0; p < pixels_; p += 2, from += 2 * kFormedAtOnce, to += kRowBlock) {
      pair_rows(from, p + 1 < pixels_ ? from + kFormedAtOnce : nullptr, kRowBlock, to);
    }
  }

  // Some of the panel's pixels as pairs of neighbours: the columns of a segment.
  void pair_pixels(Range steps, const Segment& segment) {
    E* to = columns_.data();
    for (int64_t step = steps.begin; step < steps.end; ++step, to += kTileColumns) {
      const F* const* pixel = located_.data() + 2 * step;
      const F* second = 2 * step + 1 < pixels_ ? pixel[1] + segment.band : nullptr;
      pair_rows(pixel[0] + segment.band, second, segment.width, to);
    }
  }

  // Where each pixel of the panel lies, with what its taps read.
  void locate(Range lines) {
    const Sweep& s = job_.sweep;
    const bool together = is_product() || gathers();
    const int64_t step = pixel_step();
    located_.clear();
    for (int64_t line = lines.begin; line < lines.end; line += together ? pixels_ : 1) {
      const F* from = gathers() ? gathered_.data() : band_.line(line);
      for (int64_t pixel = 0; pixel < (together ? pixels_ : s.out_w); ++pixel, from += step) {
        located_.push_back(from);
      }
    }
  }

  // Asks for the pixels of the next panel.
  void look_ahead(int64_t panel, Range rows) {
    const Sweep& s = job_.sweep;
    ahead_.clear();
    if (panel >= 0) {
      const Range lines{panel * job_.lines, at_most((panel + 1) * job_.lines, s.n * s.lines)};
      job_.input.ask(source_pixels(s, lines), ahead_);
      job_.grad.ask({lines.begin * s.out_w, lines.end * s.out_w}, ahead_);
    }
    const int64_t tiles = ceil_div(rows.end - rows.begin, kRowBlock) * 3;
    const int64_t at_once = kPairs ? 2 * kPairsAtOnce : job_.depth;
    ahead_.spread(tiles * ceil_div(job_.lines * s.out_w, at_once) * ceil_div(s.in_c, kTileColumns) *
                  int64_t(s.phases[0].taps.size()));
  }

  // Taps of one line that lie together are one segment where they fit a tile; what was gathered is
  // cut into whole tiles.
  std::vector<Segment> segments(Range columns) const {
    const Sweep& s = job_.sweep;
    const int64_t c = job_.channels(), width = columns.end - columns.begin;
    const int64_t together = job_.tap_lines(), line = job_.line_floats();
    std::vector<Segment> found;
    for (int64_t at = 0; gathers() && at < job_.row_floats; at += kTileColumns) {
      found.push_back({at, at, at_most(kTileColumns, job_.row_floats - at)});
    }
    const auto& taps = s.phases[0].taps;
    for (size_t t = 0; !gathers() && t < taps.size();
         t += together > 0 ? size_t(job_.shape.kw) : 1) {
      const int64_t at = (taps[t].dh - s.low_h) * band_.pitch() + (taps[t].dw - s.low_w) * c;
      found.push_back(
          {at, taps[t].index * job_.shape.c + columns.begin, together > 0 ? line : width});
    }
    return found;
  }

  // Groups of pixels outside: what a group's tiles read of the input stays in L1.
  void multiply(Range lines, Range rows, const Segment& segment, bool accumulate, float* out) {
    if constexpr (kPairs) {
      const int64_t parts = ceil_div(steps_, kPairsAtOnce), part = ceil_div(steps_, parts);
      for (int64_t first = 0; first < steps_; first += part) {
        const Range steps{first, at_most(first + part, steps_)};
        pair_pixels(steps, segment);
        const Stretch<E> stretch{first * kRowBlock, columns_.data(), steps.end - first, 0};
        multiply_group(&stretch, 1, kTileColumns, rows, segment, accumulate || first > 0, out);
      }
    } else {
      find_stretches(lines, segment);
      size_t begin = 0;
      for (const size_t end : ends_) {
        multiply_group(stretches_.data() + begin, int64_t(end - begin), pixel_step(), rows, segment,
                       accumulate || begin > 0, out);
        begin = end;
      }
    }
  }

  void multiply_group(const Stretch<E>* stretches, int64_t count, int64_t step, Range rows,
                      const Segment& segment, bool accumulate, float* out) {
    const TileEnd<> end{accumulate, nullptr, nullptr, nullptr, false};
    const int64_t depth = depth_of(stretches, count);
    Tile<E> tile{};
    tile.columns = int(segment.width);
    for (int64_t k = rows.begin; k < rows.end; k += kRowBlock) {
      int64_t row = k;
      for (int height : kRowsOfTiles) {
        if (row >= rows.end) {
          break;
        }
        tile.rows = int(at_most(height, rows.end - row));
        const E* a = gradient_.data() + (k - rows.begin) * steps_ + (row - k);
        for (int i = 0; i < kTileRows; ++i) {
          const int64_t at = at_most(i, tile.rows - 1);
          tile.a[i] = a + at;
          tile.c[i] = out + (row + at) * job_.row_floats + segment.out;
        }
        ahead_.give(tile, depth);
        tile_for<kRowBlock, E>(tile.rows, tile.columns)(tile, stretches, count, step, end);
        row += height;
      }
    }
  }

  // A panel's pixels in groups that are summed up in registers.
  void find_stretches(Range lines, const Segment& segment) {
    const Sweep& s = job_.sweep;
    const bool product = is_product();
    const int64_t at_once = product ? job_.depth : at_least(1, job_.depth / s.out_w);
    stretches_.clear();
    ends_.clear();
    for (int64_t first = lines.begin; first < lines.end; first += at_once) {
      const int64_t last = at_most(first + at_once, lines.end), count = product ? 1 : last - first;
      for (int64_t line = first; line < first + count; ++line) {
        const int64_t pixel = (line - lines.begin) * s.out_w;
        const F* from = gathers() ? gathered_.data() + pixel * job_.row_floats : band_.line(line);
        const F* b = from + segment.band;
        stretches_.push_back({pixel * kRowBlock, b, product ? last - first : s.out_w, 0});
      }
      ends_.push_back(stretches_.size());
    }
  }

  const WeightJob<T>& job_;
  Band<F> band_;
  Scratch<E> gradient_;
  Scratch<F> values_;   // of some of the gradient's channels, before they are paired
  Scratch<E> columns_;  // of a segment and some pixels, where they are paired
  Scratch<F> gathered_;
  Ahead ahead_;
  int64_t pixels_ = 0, steps_ = 0;
  std::vector<const F*> located_;
  std::vector<Stretch<E>> stretches_;
  std::vector<size_t> ends_;
};

// The groups' results added up, in their order.
template <class T>
void add_groups(const float* partial, int64_t groups, int64_t size, Range part, T* result) {
  const auto visit = [&](int64_t i, auto lanes) {
    Pack<float> sum = load(partial + i, lanes);
    for (int64_t group = 1; group < groups; ++group) {
      sum = sum + load(partial + group * size + i, lanes);
    }
    store(result + i, sum, lanes);
  };
  int64_t i = part.begin;
  for (; i + kPack <= part.end; i += kPack) {
    visit(i, Full{});
  }
  if (i < part.end) {
    visit(i, Part{int(part.end - i)});
  }
}

// In how many parts the blocks of rows are shared out, so that with the groups a team is busy.
int64_t splits_of(int64_t groups, int64_t blocks, int team) {
  int64_t splits = 1;
  while (splits < blocks && groups * splits % team != 0 && groups * splits < 16 * team) {
    ++splits;
  }
  return splits;
}

// Groups of panels, each with a part of the output channels.
template <class T>
void run(const WeightJob<T>& job, int threads) {
  const int64_t blocks = ceil_div(job.shape.k, kRowBlock);
  const bool apart = kInParts<T> || job.groups > 1;
  const Scratch<float> partial(apart ? job.groups * job.size() : 0);
  const int64_t work = job.sweep.n * job.sweep.lines * job.sweep.out_w * job.shape.k * job.shape.c;
  parallel(threads, work, [&](Worker worker) {
    WeightWorker<T> own(job);
    const int64_t splits = splits_of(job.groups, blocks, worker.team);
    const Range tasks = worker.share(job.groups * splits);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t group = task / splits, split = task % splits;
      const Range rows{blocks * split / splits * kRowBlock,
                       at_most(blocks * (split + 1) / splits * kRowBlock, job.shape.k)};
      float* out = apart ? partial.data() + group * job.size() : (float*)job.result;
      own.run(job.panels_of(group), rows, out);
    }
    if (!apart) {
      return;
    }
    worker.wait_for_all();
    add_groups(partial.data(), job.groups, job.size(), worker.share(job.size(), kPack), job.result);
  });
}

// ---- in squares ----

// Squares of a panel, of which those of one point lie in L2 with the gradients'; and how many of
// them are summed up in registers.
constexpr int64_t kSquares = 112, kSquaresAtOnce = 32;
constexpr int kTaps = 9;
constexpr int64_t kPointPartial = 1024 * 1024;

// The sum runs over squares: G^T [sum of (A dy A^T) * (B^T d B)] G, for each point a product of
// matrices.
struct SquaresJob {
  const WeightJob<>& direct;
  Sweep sweep;
  int64_t lines, panels, groups, blocks;

  explicit SquaresJob(const WeightJob<>& job) : direct(job), sweep(in_squares(job.sweep)) {
    const int64_t total = sweep.n * sweep.lines;
    lines = at_least(1, kSquares / at_least(1, sweep.phases[0].pixels));
    lines = ceil_div(total, ceil_div(total, lines));
    panels = ceil_div(total, lines);
    groups = at_least(1, at_most(at_most(kMostGroups, kPointPartial / size()), panels));
    blocks = ceil_div(job.shape.k, kRowBlock);
  }

  int64_t size() const { return kPoints * direct.shape.k * direct.shape.c; }
  Range panels_of(int64_t group) const {
    return {panels * group / groups, panels * (group + 1) / groups};
  }
  Range rows(int64_t block) const {
    return {block * kRowBlock, at_most((block + 1) * kRowBlock, direct.shape.k)};
  }
};

// What the groups of panels leave: the points' sums, and those of panels computed without squares,
// which `direct` says of each group and block of rows.
struct SquaresSums {
  explicit SquaresSums(const SquaresJob& job)
      : points(job.groups * job.size()),
        pixels(job.groups * job.direct.size()),
        direct(size_t(job.groups * job.blocks), 0) {}

  Scratch<float> points, pixels;
  std::vector<uint8_t> direct;
};

class SquaresWorker {
 public:
  explicit SquaresWorker(const SquaresJob& job)
      : job_(job),
        shape_(job.direct.shape),
        squares_(job.lines * job.sweep.phases[0].pixels),
        point_(points_apart(squares_ * shape_.c)),
        gradient_point_(points_apart(squares_ * job.blocks * kRowBlock)),
        band_(job.sweep, job.lines, shape_.c),
        transformed_(kPoints * point_),
        gradient_(2 * job.lines * shape_.out_w() * kRowBlock),
        transformed_gradient_(kPoints * gradient_point_) {}

  // Blocks [begin, end) of the rows over the panels of a group.
  void run(int64_t group, Range blocks, SquaresSums& sums) {
    const Sweep& s = job_.sweep;
    const Range panels = job_.panels_of(group);
    float* out = sums.points.data() + group * job_.size();
    started_.assign(size_t(job_.blocks), 0);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const Range lines{panel * job_.lines, at_most((panel + 1) * job_.lines, s.n * s.lines)};
      form(lines, blocks);
      look_ahead(panel + 1 < panels.end ? panel + 1 : -1, blocks);
      multiply(blocks, out);
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        if (fits_[size_t(block)]) {
          started_[size_t(block)] = 1;
        } else {
          add_directly(lines, group, block, sums);
        }
      }
    }
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const Range rows = job_.rows(block);
      for (int point = 0; point < kPoints && !started_[size_t(block)]; ++point) {
        memset(out + (point * shape_.k + rows.begin) * shape_.c, 0,
               sizeof(float) * size_t((rows.end - rows.begin) * shape_.c));
      }
    }
  }

 private:
  Range direct_lines(Range lines) const {
    return {line_of_squares(job_.sweep, job_.direct.sweep, lines.begin),
            line_of_squares(job_.sweep, job_.direct.sweep, lines.end)};
  }

  void form(Range lines, Range blocks) {
    count_ = (lines.end - lines.begin) * job_.sweep.phases[0].pixels;
    band_.form(job_.direct.input, lines, {0, shape_.c});
    const Values found = look_at(band_.begin(), band_.end());
    const bool fits = serve(found, double(count_ * 4 * shape_.c), 0);
    if (fits) {
      transform_band(job_.sweep, band_, lines, shape_.c, transformed_.data(), point_);
    }
    const Range own = direct_lines(lines);
    const int64_t width = shape_.out_w(), pixels = (own.end - own.begin) * width;
    fits_.assign(size_t(job_.blocks), 0);
    for (int64_t block = blocks.begin; block < blocks.end && fits; ++block) {
      job_.direct.grad.form({own.begin * width, own.end * width}, job_.rows(block),
                            gradient_.data(), kRowBlock, kRowBlock);
      const Values of_gradient = look_at(gradient_.data(), gradient_.data() + pixels * kRowBlock);
      if (serve(of_gradient, double(pixels * kRowBlock), found.largest)) {
        fits_[size_t(block)] = 1;
        transform_gradient(lines, own.begin, block);
      }
    }
  }

  // A dy A^T.
  void transform_gradient(Range lines, int64_t first, int64_t block) {
    const int64_t width = shape_.out_w(), height = shape_.out_h();
    float* to = transformed_gradient_.data() + block * squares_ * kRowBlock;
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const bool lower = line % job_.sweep.lines * 2 + 1 < height;
      const float* from =
          gradient_.data() +
          (line_of_squares(job_.sweep, job_.direct.sweep, line) - first) * width * kRowBlock;
      for (int64_t j = 0; j < width; j += 2, from += 2 * kRowBlock, to += kRowBlock) {
        const Pack<float> none = broadcast(0.0f);
        const bool right = j + 1 < width;
        const float* below = from + width * kRowBlock;
        Pack<float> t[4][2];
        FASTRES_UNROLL
        for (int q = 0; q < 2; ++q) {
          const bool there = q == 0 || right;
          const Pack<float> y0 = there ? load(from + q * kRowBlock, Full{}) : none;
          const Pack<float> y1 = there && lower ? load(below + q * kRowBlock, Full{}) : none;
          t[0][q] = y0;
          t[1][q] = y0 + y1;
          t[2][q] = y0 - y1;
          t[3][q] = -y1;
        }
        FASTRES_UNROLL
        for (int r = 0; r < 4; ++r) {
          float* row = to + 4 * r * gradient_point_;
          store(row, t[r][0], Full{});
          store(row + gradient_point_, t[r][0] + t[r][1], Full{});
          store(row + 2 * gradient_point_, t[r][0] - t[r][1], Full{});
          store(row + 3 * gradient_point_, -t[r][1], Full{});
        }
      }
    }
  }

  void look_ahead(int64_t panel, Range blocks) {
    const Sweep& s = job_.sweep;
    ahead_.clear();
    if (panel >= 0) {
      const Range lines{panel * job_.lines, at_most((panel + 1) * job_.lines, s.n * s.lines)};
      const Range own = direct_lines(lines);
      job_.direct.input.ask(source_pixels(s, lines), ahead_);
      job_.direct.grad.ask({own.begin * shape_.out_w(), own.end * shape_.out_w()}, ahead_);
    }
    const int64_t tiles = (blocks.end - blocks.begin) * 3 * ceil_div(shape_.c, kTileColumns);
    ahead_.spread(kPoints * tiles * ceil_div(count_, kSquaresAtOnce));
  }

  void multiply(Range blocks, float* out) {
    for (int point = 0; point < kPoints; ++point) {
      for (int64_t c = 0; c < shape_.c; c += kTileColumns) {
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
          if (fits_[size_t(block)]) {
            multiply_block(point, c, block, out + point * shape_.k * shape_.c);
          }
        }
      }
    }
  }

  void multiply_block(int point, int64_t c, int64_t block, float* out) {
    const Range rows = job_.rows(block);
    const float* a =
        transformed_gradient_.data() + point * gradient_point_ + block * squares_ * kRowBlock;
    const float* b = transformed_.data() + point * point_ + c;
    Tile<> tile{};
    tile.columns = int(at_most(kTileColumns, shape_.c - c));
    int64_t row = rows.begin;
    for (int height : kRowsOfTiles) {
      if (row >= rows.end) {
        break;
      }
      tile.rows = int(at_most(height, rows.end - row));
      for (int i = 0; i < kTileRows; ++i) {
        const int64_t at = row + at_most(i, tile.rows - 1);
        tile.a[i] = a + at - rows.begin;
        tile.c[i] = out + at * shape_.c + c;
      }
      const RunTile<> run = tile_for<kRowBlock>(tile.rows, tile.columns);
      for (int64_t t = 0; t < count_; t += kSquaresAtOnce) {
        const Stretch stretch{t * kRowBlock, b + t * shape_.c, at_most(kSquaresAtOnce, count_ - t),
                              0};
        ahead_.give(tile, stretch.length);
        run(tile, &stretch, 1, shape_.c,
            {started_[size_t(block)] || t > 0, nullptr, nullptr, nullptr, false});
      }
      row += height;
    }
  }

  void add_directly(Range lines, int64_t group, int64_t block, SquaresSums& sums) {
    if (!direct_) {
      direct_ = std::make_unique<WeightWorker<>>(job_.direct);
    }
    const Range own = direct_lines(lines), rows = job_.rows(block);
    const WeightJob<>& job = job_.direct;
    uint8_t& before = sums.direct[size_t(group * job_.blocks + block)];
    float* out = sums.pixels.data() + group * job.size();
    for (int64_t line = own.begin; line < own.end; line += job.lines) {
      direct_->add({line, at_most(line + job.lines, own.end)}, rows, before, out);
      before = 1;
    }
  }

  const SquaresJob& job_;
  const ConvShape& shape_;
  int64_t squares_, point_, gradient_point_;
  Band<> band_;
  Scratch<float> transformed_, gradient_, transformed_gradient_;
  Ahead ahead_;
  int64_t count_ = 0;
  std::vector<uint8_t> fits_, started_;
  std::unique_ptr<WeightWorker<>> direct_;
};

// G^T of a column of points.
template <int kColumns>
FASTRES_INLINE void sums_of_taps(const Pack<float> (&m)[4], Pack<float> (&taps)[3][kColumns],
                                 int column) {
  const Pack<float> half = broadcast(0.5f), sum = half * (m[1] + m[2]);
  taps[0][column] = m[0] + sum;
  taps[1][column] = half * (m[1] - m[2]);
  taps[2][column] = sum + m[3];
}

// G^T m G of a row's sums, with what was computed without squares.
void finish_row(const SquaresJob& job, const SquaresSums& sums, int64_t row) {
  const ConvShape& shape = job.direct.shape;
  const auto visit = [&](int64_t c, auto lanes) {
    Pack<float> t[3][4];
    FASTRES_UNROLL
    for (int q = 0; q < 4; ++q) {
      Pack<float> m[4];
      FASTRES_UNROLL
      for (int r = 0; r < 4; ++r) {
        const float* p = sums.points.data() + ((4 * r + q) * shape.k + row) * shape.c + c;
        m[r] = load(p, lanes);
        for (int64_t group = 1; group < job.groups; ++group) {
          m[r] = m[r] + load(p + group * job.size(), lanes);
        }
      }
      sums_of_taps(m, t, q);
    }
    FASTRES_UNROLL
    for (int r = 0; r < 3; ++r) {
      Pack<float> taps[3][1];
      const Pack<float> m[4] = {t[r][0], t[r][1], t[r][2], t[r][3]};
      sums_of_taps(m, taps, 0);
      FASTRES_UNROLL
      for (int q = 0; q < 3; ++q) {
        const int64_t at = (row * kTaps + 3 * r + q) * shape.c + c;
        Pack<float> v = taps[q][0];
        for (int64_t group = 0; group < job.groups; ++group) {
          if (sums.direct[size_t(group * job.blocks + row / kRowBlock)]) {
            v = v + load(sums.pixels.data() + group * job.direct.size() + at, lanes);
          }
        }
        store(job.direct.result + at, v, lanes);
      }
    }
  };
  int64_t c = 0;
  for (; c + kPack <= shape.c; c += kPack) {
    visit(c, Full{});
  }
  if (c < shape.c) {
    visit(c, Part{int(shape.c - c)});
  }
}

void run(const SquaresJob& job, int threads) {
  const ConvShape& shape = job.direct.shape;
  SquaresSums sums(job);
  const int64_t work = job.sweep.n * job.sweep.lines * job.sweep.out_w * shape.k * shape.c;
  parallel(threads, work, [&](Worker worker) {
    SquaresWorker own(job);
    const int64_t splits = splits_of(job.groups, job.blocks, worker.team);
    const Range tasks = worker.share(job.groups * splits);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t split = task % splits;
      own.run(task / splits, {job.blocks * split / splits, job.blocks * (split + 1) / splits},
              sums);
    }
    worker.wait_for_all();
    const Range rows = worker.share(shape.k);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      finish_row(job, sums, row);
    }
  });
}

}  // namespace

template <class T>
void conv_backward_weight(const ConvWeightArgs& a) {
  using Input = typename WeightJob<T>::Input;
  with_input<T>(a.input, a.shape.c, [&](const Input& input) {
    with_gradient<T>(a.grad, [&](const Input& grad) {
      const WeightJob<T> job(a.shape, input, grad, (T*)a.grad_weight);
      if constexpr (std::is_same_v<T, float>) {
        if (a.winograd) {
          run(SquaresJob(job), a.threads);
          return;
        }
      }
      run(job, a.threads);
    });
  });
}

FASTRES_CONVOLUTIONS(template void conv_backward_weight, (const ConvWeightArgs&))

}  // namespace fastres::cpu::FASTRES_ISA
