// Where the taps of a convolution lie, forward and for its data gradient, as one kind of loop.
//
// A `Sweep` computes an output [n, out_h, out_w] from a source [n, in_h, in_w]. Its output pixels
// fall into phases: those of a forward convolution into one, those of the data gradient of a
// strided one into as many as the stride has remainders. Pixel (i, j) of a phase is the output's
// (h0 + i * out_step_h, w0 + j * out_step_w), and reads the source at
// (i * in_step_h + tap.dh, j * in_step_w + tap.dw) for each of the phase's taps; beyond the
// source's edges there are zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace fastres::cpu {

struct Tap {
  int64_t dh, dw;
  int64_t index;  // of the weight's [kh, kw]
};

struct Phase {
  int64_t h0, w0;         // first output pixel
  int64_t lines, pixels;  // of the phase, per image and per line
  std::vector<Tap> taps;
};

struct Sweep {
  int64_t n, in_h, in_w, in_c, out_h, out_w, out_c;
  int64_t in_step_h, in_step_w, out_step_h, out_step_w;
  std::vector<Phase> phases;
  int64_t weight_taps;
  int64_t lines;                         // of the phase that has most
  int64_t low_h, high_h, low_w, high_w;  // the least and the greatest offsets of all taps

  // Whether an output pixel reads nothing but the source pixel that it stands for.
  bool pointwise() const {
    return phases.size() == 1 && phases[0].taps.size() == 1 && low_h == 0 && low_w == 0;
  }
  // Multiplications.
  int64_t products() const {
    int64_t all = 0;
    for (const Phase& phase : phases) {
      all += phase.lines * phase.pixels * int64_t(phase.taps.size());
    }
    return n * all * in_c * out_c;
  }
  // Pixels of a line, in the phase that has most.
  int64_t line_pixels() const {
    int64_t pixels = 0;
    for (const Phase& phase : phases) {
      pixels = std::max(pixels, phase.pixels);
    }
    return pixels;
  }
  // Columns of the source that a line reads, from `low_w` on.
  int64_t band_width() const {
    return std::max<int64_t>(line_pixels() - 1, 0) * in_step_w + high_w - low_w + 1;
  }
};

namespace detail {

inline void bound_taps(Sweep& sweep) {
  bool first = true;
  sweep.low_h = sweep.high_h = sweep.low_w = sweep.high_w = 0;
  sweep.lines = 0;
  for (const Phase& phase : sweep.phases) {
    sweep.lines = std::max(sweep.lines, phase.lines);
    for (const Tap& tap : phase.taps) {
      sweep.low_h = first ? tap.dh : std::min(sweep.low_h, tap.dh);
      sweep.high_h = first ? tap.dh : std::max(sweep.high_h, tap.dh);
      sweep.low_w = first ? tap.dw : std::min(sweep.low_w, tap.dw);
      sweep.high_w = first ? tap.dw : std::max(sweep.high_w, tap.dw);
      first = false;
    }
  }
}

// A convolution with one tap, stride 1 and no padding is a product of matrices: its pixels are
// taken as one image, of lines of one pixel.
inline bool is_product(const ConvShape& s) {
  return s.kh == 1 && s.kw == 1 && s.sh == 1 && s.sw == 1 && s.ph == 0 && s.pw == 0;
}

}  // namespace detail

inline ConvShape flattened(ConvShape s) {
  if (detail::is_product(s)) {
    s.h *= s.n * s.w;
    s.n = s.w = 1;
  }
  return s;
}

inline Sweep forward_sweep(const ConvShape& given) {
  const ConvShape s = flattened(given);
  Sweep sweep{s.n, s.h, s.w, s.c,      s.out_h(), s.out_w(), s.k, s.sh, s.sw,
              1,   1,   {},  s.taps(), 0,         0,         0,   0,    0};
  Phase phase{0, 0, s.out_h(), s.out_w(), {}};
  for (int64_t r = 0; r < s.kh; ++r) {
    for (int64_t q = 0; q < s.kw; ++q) {
      phase.taps.push_back({r * s.dh - s.ph, q * s.dw - s.pw, r * s.kw + q});
    }
  }
  sweep.phases.push_back(phase);
  detail::bound_taps(sweep);
  return sweep;
}

// The data gradient at h sums up the taps r with oh * sh = h + ph - r * dh, of which those with the
// right remainder exist.
inline Sweep data_gradient_sweep(const ConvShape& given) {
  const ConvShape s = flattened(given);
  Sweep sweep{s.n,  s.out_h(), s.out_w(), s.k,      s.h, s.w, s.c, 1, 1,
              s.sh, s.sw,      {},        s.taps(), 0,   0,   0,   0, 0};
  for (int64_t h0 = 0; h0 < std::min(s.sh, s.h); ++h0) {
    for (int64_t w0 = 0; w0 < std::min(s.sw, s.w); ++w0) {
      Phase phase{h0, w0, (s.h - h0 + s.sh - 1) / s.sh, (s.w - w0 + s.sw - 1) / s.sw, {}};
      for (int64_t r = 0; r < s.kh; ++r) {
        for (int64_t q = 0; q < s.kw; ++q) {
          const int64_t h = h0 + s.ph - r * s.dh, w = w0 + s.pw - q * s.dw;
          if (h % s.sh == 0 && w % s.sw == 0) {
            phase.taps.push_back({h / s.sh, w / s.sw, r * s.kw + q});
          }
        }
      }
      sweep.phases.push_back(phase);
    }
  }
  detail::bound_taps(sweep);
  return sweep;
}

// Whether Winograd's F(2x2, 3x3) computes it.
inline bool is_winograd(const ConvShape& s) {
  return s.kh == 3 && s.kw == 3 && s.sh == 1 && s.sw == 1 && s.dh == 1 && s.dw == 1;
}

// The same sweep with squares of two by two output pixels for its pixels: each reads four by four
// pixels of the source, and those at the far edges may cover pixels that do not exist.
inline Sweep in_squares(Sweep s) {
  Phase& phase = s.phases[0];
  phase.lines = s.lines = (phase.lines + 1) / 2;
  phase.pixels = (phase.pixels + 1) / 2;
  s.in_step_h = s.in_step_w = s.out_step_h = s.out_step_w = 2;
  s.high_h += 1;
  s.high_w += 1;
  return s;
}

}  // namespace fastres::cpu
