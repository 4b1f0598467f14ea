// The loops around the register tile: a convolution, or the data gradient of one, panel by panel.
//
// A panel is a few lines of output pixels. What they read is formed once, padded with zeros, into a
// band of memory that stays in L2; a block of the packed weight's columns is multiplied by all
// tiles of the panel before the next one comes. Panels depend on the shape alone, so that sums over
// them have the same bits for any number of threads.
#pragma once

#include <vector>

#include "cpu/geometry.h"
#include "cpu/source.h"
#include "cpu/tile.h"
#include "cpu/weight.h"

namespace fastres::cpu::FASTRES_ISA {

// Steps of k that are summed up in registers at a time: 128 KB of a block of the weight, and a sum
// short enough for its error not to show.
inline constexpr int64_t kDepth = 512;
// Floats of a panel: with the block of the weight it fits L2.
inline constexpr int64_t kPanelFloats = 64 * 1024;
// Pixels of a panel: enough to use a block of the weight often, few enough to share them out.
inline constexpr int64_t kFewestPixels = 48, kMostPixels = 192;

// Lines of a sweep cut into panels.
struct PanelCut {
  int64_t lines, panels;

  PanelCut(int64_t lines, int64_t panels) : lines(lines), panels(panels) {}
  explicit PanelCut(const Sweep& s) {
    int64_t pixels = 0;
    for (const Phase& phase : s.phases) {
      pixels += phase.pixels;
    }
    const int64_t floats = s.band_width() * s.in_c * s.in_step_h;
    const int64_t least = ceil_div(kFewestPixels, at_least(1, pixels));
    const int64_t most = at_least(1, kMostPixels / at_least(1, pixels));
    lines = at_most(at_least(kPanelFloats / at_least(1, floats), least), most);
    const int64_t total = s.n * s.lines;
    panels = ceil_div(total, at_least(1, lines));
    if (panels > 0) {  // of equal size, in whole tiles where a line is one pixel
      lines = ceil_div(total, panels);
      lines = pixels == 1 ? round_up(lines, kTileRows) : lines;
      panels = ceil_div(total, lines);
    }
  }
};

// Rows of the output that the lines before `line` cover.
FASTRES_INLINE int64_t rows_before(const Sweep& s, int64_t line) {
  const int64_t image = line / s.lines, inner = line % s.lines;
  return (image * s.out_h + at_most(inner * s.out_step_h, s.out_h)) * s.out_w;
}

// Pixels of the source that lines read, but for those of the lines before.
FASTRES_INLINE Range source_pixels(const Sweep& s, Range lines) {
  const auto row = [&](int64_t line) {
    const int64_t inner = line % s.lines * s.in_step_h + at_least(0, s.high_h);
    return (line / s.lines * s.in_h + at_most(inner, s.in_h)) * s.in_w;
  };
  return {row(lines.begin), at_most(row(lines.end), s.n * s.in_h * s.in_w)};
}

// The source pixels of a panel, with zeros around the image.
template <class F = float>
class Band {
 public:
  // For at most `lines` lines, of `channels` columns at a time.
  Band(const Sweep& s, int64_t lines, int64_t channels)
      : s_(s),
        width_(s.band_width()),
        channels_(channels),
        pitch_(width_ * channels),
        memory_(size(s, lines) * pitch_ + kTileColumns) {}

  // Forms lines [begin, end) of the sweep, which may belong to several images; columns that do not
  // exist become zero.
  void form(const Source<F>& source, Range lines, Range columns) {
    lines_ = lines;
    columns_ = columns;
    F* to = memory_.data();
    starts_.clear();
    for (int64_t line = lines.begin; line < lines.end;) {
      const int64_t image = line / s_.lines, first = line % s_.lines;
      const int64_t count = at_most(s_.lines - first, lines.end - line);
      starts_.push_back(to - memory_.data());
      const int64_t top = first * s_.in_step_h + s_.low_h;
      const int64_t rows = (count - 1) * s_.in_step_h + s_.high_h - s_.low_h + 1;
      to = form_image(source, image, top, rows, to);
      line += count;
    }
    end_ = to;
  }

  // What was formed, zeros around the image with it.
  const F* begin() const { return memory_.data(); }
  const F* end() const { return end_; }

  // Where the source pixel of tap (low_h, low_w) of a line's first pixel is.
  const F* line(int64_t line) const {
    const int64_t first = lines_.begin / s_.lines, image = line / s_.lines;
    const int64_t begin = image == first ? lines_.begin % s_.lines : 0;
    return memory_.data() + starts_[size_t(image - first)] +
           (line % s_.lines - begin) * s_.in_step_h * pitch_;
  }

  int64_t pitch() const { return pitch_; }

 private:
  // Rows of the source.
  static int64_t size(const Sweep& s, int64_t lines) {
    const int64_t images = at_most(s.n, ceil_div(lines, at_least(1, s.lines)) + 1);
    return lines * s.in_step_h + images * (s.high_h - s.low_h + 1);
  }

  F* form_image(const Source<F>& source, int64_t image, int64_t top, int64_t rows, F* to) {
    const int64_t left = at_least(0, -s_.low_w), c = channels_;
    const int64_t begin = at_least(0, s_.low_w), end = at_most(s_.in_w, s_.low_w + width_);
    if (left == 0 && begin == 0 && end == width_ && end == s_.in_w && top >= 0 &&
        top + rows <= s_.in_h) {  // whole rows, which lie together
      const int64_t pixel = (image * s_.in_h + top) * s_.in_w, pixels = rows * s_.in_w;
      source.form({pixel, pixel + pixels}, columns_, to, c, c);
      return to + pixels * c;
    }
    for (int64_t row = top; row < top + rows; ++row, to += pitch_) {
      if (row < 0 || row >= s_.in_h || begin >= end) {
        memset((void*)to, 0, sizeof(F) * size_t(pitch_));
        continue;
      }
      const int64_t pixel = (image * s_.in_h + row) * s_.in_w, pixels = end - begin;
      memset((void*)to, 0, sizeof(F) * size_t(left * c));
      source.form({pixel + begin, pixel + end}, columns_, to + left * c, c, c);
      memset((void*)(to + (left + pixels) * c), 0,
             sizeof(F) * size_t((width_ - left - pixels) * c));
    }
    return to;
  }

  const Sweep& s_;
  int64_t width_, channels_, pitch_;
  Scratch<F> memory_;
  Range lines_{0, 0}, columns_{0, 0};
  std::vector<int64_t> starts_;
  const F* end_ = nullptr;
};

// The taps of a phase as stretches of k, in groups of about kDepth steps.
template <class E>
struct PhaseStretches {
  std::vector<Stretch<E>> all;
  std::vector<size_t> ends;

  // `pitch` counts steps, as does a pixel's `in_c`.
  PhaseStretches(const Sweep& s, const Phase& phase, int64_t pitch, int64_t in_c) {
    int64_t depth = 0;
    for (size_t t = 0; t < phase.taps.size();) {
      const Tap& first = phase.taps[t];
      size_t next = t + 1;
      while (next < phase.taps.size() && follows(phase.taps[next], phase.taps[next - 1])) {
        ++next;
      }
      const int64_t a = (first.dh - s.low_h) * pitch + (first.dw - s.low_w) * in_c;
      add({a, nullptr, int64_t(next - t) * in_c, first.index * in_c}, depth);
      t = next;
    }
    ends.push_back(all.size());
  }

 private:
  static bool follows(const Tap& tap, const Tap& before) {
    return tap.dh == before.dh && tap.dw == before.dw + 1 && tap.index == before.index + 1;
  }

  void add(const Stretch<E>& stretch, int64_t& depth) {
    const int64_t parts = ceil_div(stretch.length, kDepth), part = ceil_div(stretch.length, parts);
    for (int64_t k = 0; k < stretch.length; k += part) {
      const int64_t length = at_most(part, stretch.length - k);
      if (depth > 0 && depth + length > kDepth) {
        ends.push_back(all.size());
        depth = 0;
      }
      all.push_back({stretch.a + k, nullptr, length, stretch.step + k});
      depth += length;
    }
  }
};

// What stands in front of a sweep, and behind it.
template <class T = float>
struct SweepArgs {
  const Source<Formed<Operand<T>>>& source;
  const T* plain;  // the source itself where nothing has to be formed, or null
  WeightView<T> weight;
  const Operand<T>* packed;  // or null
  T* out;
  const T* residual = nullptr;  // shape of the output, or null
  bool accumulate = false;
  const T* bias = nullptr;
  const float *scale = nullptr, *shift = nullptr;
  bool relu = false;
  int threads;
  const T* late;        // shape of the output: what is read behind a panel's products, or null
  const Sweep* direct;  // of a sweep in squares: the same without, else null
};

// Asks for what comes behind a panel's products, and for what the next panel reads and writes.
template <class T>
void ask_for_next(const Sweep& s, const SweepArgs<T>& args, Range rows, Range next, Ahead& ahead) {
  ahead.clear();
  ahead.ask(args.late, rows, s.out_c);
  if (next.begin < next.end) {
    args.source.ask(source_pixels(s, next), ahead);
    ahead.ask(args.out, {rows_before(s, next.begin), rows_before(s, next.end)}, s.out_c);
  }
}

// One worker's tiles.
template <class T = float>
class Sweeper {
  using E = Operand<T>;
  using F = Formed<E>;

 public:
  static PanelCut cut(const Sweep& s) { return PanelCut(s); }

  Sweeper(const Sweep& s, const SweepArgs<T>& args, const PanelCut& cut)
      : s_(s),
        args_(args),
        depth_(steps_of<E>(s.in_c)),
        direct_(args.plain && s.pointwise() && lies_as_formed(s)),
        band_(s, direct_ ? 0 : cut.lines, depth_ * kPerStep<E>),
        block_(args.packed ? 0 : kDepth * kTileColumns),
        parts_(in_parts(s) ? cut.lines * s.line_pixels() * kTileColumns : 0) {}

  void form(Range lines) {
    if (!direct_) {
      band_.form(args_.source, lines, {0, s_.in_c});
    }
  }

  void look_ahead(Range rows, Range columns, Range next) {
    ask_for_next(s_, args_, rows, next, ahead_);
    const int64_t tiles = ceil_div(rows.end - rows.begin, kTileRows);
    ahead_.spread(tiles * ceil_div(columns.end - columns.begin, kTileColumns));
  }

  // Columns [begin, end) of the output, of which `begin` is the first of a block.
  void multiply(Range lines, Range columns) {
    for (const Phase& phase : s_.phases) {
      if (phase.taps.empty() && args_.accumulate) {
        continue;
      }
      locate(lines, phase);
      PhaseStretches<E> stretches(s_, phase, band_.pitch() / kPerStep<E>, depth_);
      for (int64_t col = columns.begin; col < columns.end; col += kTileColumns) {
        const int width = int(at_most(kTileColumns, columns.end - col));
        size_t begin = 0;
        for (size_t group = 0; group < stretches.ends.size(); ++group) {
          const size_t end = stretches.ends[group];
          Stretch<E>* first = stretches.all.data() + begin;
          find_weight(first, int64_t(end - begin), col);
          run_block(first, int64_t(end - begin), col, width, group == 0,
                    group + 1 == stretches.ends.size());
          begin = end;
        }
      }
    }
  }

 private:
  // Whether memory holds a pixel as a band does: values as they are, and whole steps of them.
  static bool lies_as_formed(const Sweep& s) {
    return std::is_same_v<T, F> && s.in_c % kPerStep<E> == 0;
  }
  bool in_parts(const Sweep& s) const { return kInParts<T> && depth_ * s.weight_taps > kDepth; }

  // Where the stretches' part of a block of the weight is: packed ahead, or here and now.
  void find_weight(Stretch<E>* stretches, int64_t count, int64_t col) {
    const int64_t steps = depth_ * s_.weight_taps;
    E* to = block_.data();
    for (int64_t i = 0; i < count; ++i) {
      Stretch<E>& stretch = stretches[i];
      if (args_.packed) {
        stretch.b = args_.packed + col * steps + stretch.step * kTileColumns;
      } else {
        args_.weight.pack(col, {stretch.step, stretch.step + stretch.length}, to);
        stretch.b = to;
        to += stretch.length * kTileColumns;
      }
    }
  }

  // Where each pixel of the panel reads and writes.
  void locate(Range lines, const Phase& phase) {
    from_.clear();
    to_.clear();
    const F* plain = (const F*)args_.plain;
    const int64_t in_c = depth_ * kPerStep<E>;
    for (int64_t line = lines.begin; line < lines.end;) {
      const int64_t image = line / s_.lines, first = line % s_.lines;
      const int64_t end = at_most(s_.lines, first + lines.end - line);
      const F* from = direct_ ? plain + (image * s_.in_h + first * s_.in_step_h) * s_.in_w * in_c
                              : band_.line(line);
      const int64_t pitch = s_.in_step_h * (direct_ ? s_.in_w * in_c : band_.pitch());
      for (int64_t i = first; i < at_most(end, phase.lines); ++i, from += pitch) {
        int64_t to =
            ((image * s_.out_h + phase.h0 + i * s_.out_step_h) * s_.out_w + phase.w0) * s_.out_c;
        for (int64_t j = 0; j < phase.pixels; ++j, to += s_.out_step_w * s_.out_c) {
          from_.push_back((const E*)(from + j * s_.in_step_w * in_c));
          to_.push_back(to);
        }
      }
      line += end - first;
    }
  }

  TileEnd<T> end_of(int64_t col, bool first, bool last) const {
    TileEnd<T> end{!first || args_.accumulate, first && args_.bias ? args_.bias + col : nullptr,
                   last && args_.scale ? args_.scale + col : nullptr,
                   last && args_.scale ? args_.shift + col : nullptr, last && args_.relu};
    if constexpr (kInParts<T>) {
      end.from_parts = !first;
      end.to_parts = !last;
    }
    return end;
  }

  void run_block(const Stretch<E>* stretches, int64_t count, int64_t col, int width, bool first,
                 bool last) {
    const TileEnd<T> end = end_of(col, first, last);
    Tile<E, T> tile;
    tile.has_residual = last && args_.residual;
    tile.columns = width;
    const int64_t pixels = int64_t(from_.size());
    const int64_t depth = depth_of(stretches, count);
    for (int64_t p = 0; p < pixels; p += kTileRows) {
      tile.rows = int(at_most(kTileRows, pixels - p));
      for (int i = 0; i < kTileRows; ++i) {
        const size_t at = size_t(p + at_most(i, tile.rows - 1));
        tile.a[i] = from_[at];
        tile.c[i] = args_.out + to_[at] + col;
        tile.residual[i] = tile.has_residual ? args_.residual + to_[at] + col : nullptr;
        if constexpr (kInParts<T>) {
          tile.parts[i] = parts_.data() + int64_t(at) * kTileColumns;
        }
      }
      ahead_.give(tile, depth);
      tile_for<1, E, T>(tile.rows, width)(tile, stretches, count, kTileColumns, end);
    }
  }

  const Sweep& s_;
  const SweepArgs<T>& args_;
  int64_t depth_;  // steps of k of a pixel
  bool direct_;
  Band<F> band_;
  Scratch<E> block_;
  Scratch<float> parts_;  // of a panel's rows, for one block of columns
  Ahead ahead_;
  std::vector<const E*> from_;
  std::vector<int64_t> to_;
};

// Panels and groups of columns, and how they are shared out. Only who computes what depends on the
// number of threads.
struct Tasks {
  int64_t panels, blocks, groups;

  Tasks(const PanelCut& cut, int64_t columns, int team) : panels(cut.panels) {
    blocks = ceil_div(columns, kTileColumns);
    groups = 1;
    for (int64_t more = 2; more <= blocks && idle(groups, team) > 0.05; ++more) {
      groups = idle(more, team) < idle(groups, team) ? more : groups;
    }
  }
  int64_t count() const { return panels * groups; }
  int64_t panel(int64_t task) const { return task % panels; }
  Range columns(int64_t task, int64_t total) const {
    const int64_t group = task / panels;
    return {at_most(blocks * group / groups * kTileColumns, total),
            at_most(blocks * (group + 1) / groups * kTileColumns, total)};
  }

 private:
  // The part of the team's time that goes to waste: whoever has most, has so many of the largest.
  double idle(int64_t groups, int team) const {
    const int64_t most = ceil_div(panels * groups, team) * ceil_div(blocks, groups);
    return 1 - double(panels * blocks) / double(most * team);
  }
};

// before(rows, columns) and after(panel, rows, columns) are called around each panel's products,
// with the rows of the output that it covers; finish(worker) when all panels are done.
template <class Sweeper, class T, class Before, class After, class Finish>
void run_sweep(const Sweep& s, const SweepArgs<T>& args, const Before& before, const After& after,
               const Finish& finish) {
  const PanelCut cut = Sweeper::cut(s);
  // A core does about eight multiplications in the time of a byte from memory.
  parallel(args.threads, s.products() / 8, [&](Worker worker) {
    const Tasks tasks(cut, s.out_c, worker.team);
    Sweeper sweeper(s, args, cut);
    int64_t formed = -1;
    const Range share = worker.share(tasks.count());
    for (int64_t task = share.begin; task < share.end; ++task) {
      const int64_t panel = tasks.panel(task);
      const Range lines{panel * cut.lines, at_most((panel + 1) * cut.lines, s.n * s.lines)};
      const Range rows{rows_before(s, lines.begin), rows_before(s, lines.end)};
      const Range columns = tasks.columns(task, s.out_c);
      if (panel != formed) {
        sweeper.form(lines);
        formed = panel;
      }
      before(rows, columns);
      const int64_t next = task + 1 < share.end ? tasks.panel(task + 1) : panel;
      sweeper.look_ahead(
          rows, columns,
          {next == panel ? lines.end : next * cut.lines,
           next == panel ? lines.end : at_most((next + 1) * cut.lines, s.n * s.lines)});
      sweeper.multiply(lines, columns);
      after(panel, rows, columns);
    }
    worker.wait_for_all();
    finish(worker, cut);
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
