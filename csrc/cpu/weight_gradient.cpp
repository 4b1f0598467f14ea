// grad_weight[k, tap, c] = sum over pixels of grad_y[pixel, k] * input[pixel + tap, c].
//
// The sum runs over pixels: a tile's rows are output channels, its columns input channels. A panel
// of pixels is formed once: the gradient in blocks of 16 channels, the input as a band of as many
// as a tile has columns.
#include "cpu/convolve.h"
#include "cpu/table.h"

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

// Columns of the result that one tile has: where they begin in a band and in a row of the result.
struct Segment {
  int64_t band, out, width;
};

struct WeightJob {
  const ConvShape& shape;
  Sweep sweep;
  const Source &input, &grad;
  float* result;
  int64_t row_floats;  // of one output channel
  int64_t lines, panels, groups;
  int64_t depth;  // pixels summed up at a time

  WeightJob(const ConvShape& s, const Source& input, const Source& grad, float* result)
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
  Range panels_of(int64_t group) const {
    return {panels * group / groups, panels * (group + 1) / groups};
  }
};

class WeightWorker {
 public:
  explicit WeightWorker(const WeightJob& job)
      : job_(job),
        band_(job.sweep, job.lines, job.channels()),
        gradient_(round_up(job.shape.k, kRowBlock) * job.lines * job.sweep.out_w) {}

  // Rows [begin, end) of the result over the panels of a group.
  void run(Range panels, Range rows, float* out) {
    const Sweep& s = job_.sweep;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const Range lines{panel * job_.lines, at_most((panel + 1) * job_.lines, s.n * s.lines)};
      form_gradient(lines, rows);
      look_ahead(panel + 1 < panels.end ? panel + 1 : -1, rows);
      for (int64_t c = 0; c < s.in_c; c += kTileColumns) {
        const Range columns{c, at_most(c + kTileColumns, s.in_c)};
        band_.form(job_.input, lines, columns);
        for (const Segment& segment : segments(columns)) {
          multiply(lines, rows, segment, panel > panels.begin, out);
        }
      }
    }
  }

 private:
  void form_gradient(Range lines, Range rows) {
    const int64_t width = job_.sweep.out_w;
    pixels_ = (lines.end - lines.begin) * width;
    float* to = gradient_.data();
    for (int64_t k = rows.begin; k < rows.end; k += kRowBlock, to += pixels_ * kRowBlock) {
      const Range channels{k, at_most(k + kRowBlock, rows.end)};
      job_.grad.form({lines.begin * width, lines.end * width}, channels, to, kRowBlock, true);
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
    ahead_.spread(tiles * ceil_div(s.in_c, kTileColumns) * int64_t(s.phases[0].taps.size()));
  }

  // Taps of one line that lie together are one segment where they fit a tile.
  std::vector<Segment> segments(Range columns) const {
    const Sweep& s = job_.sweep;
    const ConvShape& shape = job_.shape;
    const int64_t c = job_.channels(), width = columns.end - columns.begin;
    const bool joined = shape.dw == 1 && shape.kw * shape.c <= kTileColumns;
    std::vector<Segment> found;
    const auto& taps = s.phases[0].taps;
    for (size_t t = 0; t < taps.size(); t += joined ? size_t(shape.kw) : 1) {
      const int64_t at = (taps[t].dh - s.low_h) * band_.pitch() + (taps[t].dw - s.low_w) * c;
      found.push_back(
          {at, taps[t].index * shape.c + columns.begin, joined ? shape.kw * shape.c : width});
    }
    return found;
  }

  void multiply(Range lines, Range rows, const Segment& segment, bool accumulate, float* out) {
    const Sweep& s = job_.sweep;
    find_stretches(lines, segment);
    const int64_t step = s.in_step_w * job_.channels();
    Tile tile{};
    tile.columns = int(segment.width);
    for (int64_t k = rows.begin; k < rows.end; k += kRowBlock) {
      int64_t row = k;
      for (int height : kRowsOfTiles) {
        if (row >= rows.end) {
          break;
        }
        tile.rows = int(at_most(height, rows.end - row));
        const float* a = gradient_.data() + (k - rows.begin) * pixels_ + (row - k);
        for (int i = 0; i < kTileRows; ++i) {
          const int64_t at = at_most(i, tile.rows - 1);
          tile.a[i] = a + at;
          tile.c[i] = out + (row + at) * job_.row_floats + segment.out;
        }
        ahead_.give(tile, pixels_);
        run_tile(tile, step, accumulate);
        row += height;
      }
    }
  }

  // A panel's pixels in groups that are summed up in registers.
  void find_stretches(Range lines, const Segment& segment) {
    const Sweep& s = job_.sweep;
    const bool product = s.in_w == 1 && s.in_step_h == 1 && s.n == 1;  // lines of one pixel
    const int64_t at_once = product ? job_.depth : at_least(1, job_.depth / s.out_w);
    stretches_.clear();
    ends_.clear();
    for (int64_t first = lines.begin; first < lines.end; first += at_once) {
      const int64_t last = at_most(first + at_once, lines.end), count = product ? 1 : last - first;
      for (int64_t line = first; line < first + count; ++line) {
        const float* b = band_.line(line) + segment.band;
        const int64_t pixel = (line - lines.begin) * s.out_w;
        stretches_.push_back({pixel * kRowBlock, b, product ? last - first : s.out_w, 0});
      }
      ends_.push_back(stretches_.size());
    }
  }

  void run_tile(Tile& tile, int64_t step, bool accumulate) const {
    const RunTile run = tile_for<kRowBlock>(tile.rows, tile.columns);
    size_t begin = 0;
    for (const size_t end : ends_) {
      const TileEnd sums{accumulate || begin > 0, nullptr, nullptr, nullptr, false};
      run(tile, stretches_.data() + begin, int64_t(end - begin), step, sums);
      begin = end;
    }
  }

  const WeightJob& job_;
  Band band_;
  Scratch<float> gradient_;
  Ahead ahead_;
  int64_t pixels_ = 0;
  std::vector<Stretch> stretches_;
  std::vector<size_t> ends_;
};

// The groups' results added up, in their order.
void add_groups(const float* partial, int64_t groups, int64_t size, Range part, float* result) {
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

// Groups of panels, each with a part of the output channels.
void run(const WeightJob& job, int threads) {
  const int64_t blocks = ceil_div(job.shape.k, kRowBlock);
  const Scratch<float> partial(job.groups > 1 ? job.groups * job.size() : 0);
  const int64_t work = job.sweep.n * job.sweep.lines * job.sweep.out_w * job.shape.k * job.shape.c;
  parallel(threads, work, [&](Worker worker) {
    WeightWorker own(job);
    int64_t splits = 1;
    while (splits < blocks && job.groups * splits % worker.team != 0 &&
           job.groups * splits < 16 * worker.team) {
      ++splits;
    }
    const Range tasks = worker.share(job.groups * splits);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t group = task / splits, split = task % splits;
      const Range rows{blocks * split / splits * kRowBlock,
                       at_most(blocks * (split + 1) / splits * kRowBlock, job.shape.k)};
      float* out = job.groups > 1 ? partial.data() + group * job.size() : job.result;
      own.run(job.panels_of(group), rows, out);
    }
    if (job.groups == 1) {
      return;
    }
    worker.wait_for_all();
    add_groups(partial.data(), job.groups, job.size(), worker.share(job.size(), kPack), job.result);
  });
}

}  // namespace

void conv_backward_weight(const ConvWeightArgs& a) {
  with_input(a.input, a.shape.c, [&](const Source& input) {
    with_gradient(a.grad, [&](const Source& grad) {
      run(WeightJob(a.shape, input, grad, a.grad_weight), a.threads);
    });
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
