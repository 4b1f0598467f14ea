// What a convolution reads, formed panel by panel: pixels of an activation with their normalisation
// and activation, or of a gradient with its gate and its batch norm's backward.
#pragma once

#include "cpu/activation.h"
#include "cpu/gate.h"
#include "cpu/scratch.h"

namespace fastres::cpu::FASTRES_ISA {

// Columns [begin, end) of the pixels [first, last), to rows of `stride` floats. Where `whole`, the
// destination has room for whole packs, whose lanes beyond the last column become zero.
class Source {
 public:
  virtual ~Source() = default;
  virtual void form(Range pixels, Range columns, float* to, int64_t stride, bool whole) const = 0;
};

// So many pixels ahead what is read is asked for: panels are read in pieces of a line.
inline constexpr int64_t kRowsAhead = 8;

FASTRES_INLINE void prefetch_line(const float* p) { __builtin_prefetch(p, 0, 3); }

// Op: `params(col, lanes)`, `value(row, col, params, lanes)`, and `prefetch(offset)`.
template <class Op>
class SourceOf final : public Source {
 public:
  explicit SourceOf(const Op& op) : op_(op) {}

  void form(Range pixels, Range columns, float* to, int64_t stride, bool whole) const override {
    const Op op = op_;  // of our own: no store can change it
    for (int64_t row = pixels.begin; row < pixels.end; ++row, to += stride) {
      int64_t col = columns.begin;
      float* out = to;
      for (; col + kPack <= columns.end; col += kPack, out += kPack) {
        op.prefetch((row + kRowsAhead) * op.cols + col);
        store(out, op.value(row, col, op.params(col, Full{}), Full{}), Full{});
      }
      if (col < columns.end) {
        const Part rest{int(columns.end - col)};
        const Pack<float> v = op.value(row, col, op.params(col, rest), rest);
        if (whole) {
          store(out, existing(rest, v), Full{});
        } else {
          store(out, v, rest);
        }
      }
    }
  }

 private:
  Op op_;
};

struct PlainPixels {
  const float* x;
  int64_t cols;
  struct Params {};

  FASTRES_INLINE void prefetch(int64_t at) const { prefetch_line(x + at); }

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t, Lanes) const {
    return {};
  }
  template <class Lanes>
  FASTRES_INLINE Pack<float> value(int64_t row, int64_t col, const Params&, Lanes lanes) const {
    return load(x + row * cols + col, lanes);
  }
};

template <class Act>
struct ActivatedPixels {
  const float *x, *scale, *shift;
  int64_t cols;
  Act act;
  struct Params {
    Pack<float> scale, shift;
  };

  FASTRES_INLINE void prefetch(int64_t at) const { prefetch_line(x + at); }

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t col, Lanes lanes) const {
    return {load(scale + col, lanes), load(shift + col, lanes)};
  }
  template <class Lanes>
  FASTRES_INLINE Pack<float> value(int64_t row, int64_t col, const Params& p, Lanes lanes) const {
    return act.value(fma(p.scale, load(x + row * cols + col, lanes), p.shift));
  }
};

// grad_y = a * g + b * y + c; without kReadY b and c are zero.
template <Gating kGate, bool kReadY>
struct GradientPixels {
  GatedGradient<float, true, kGate> gradient;
  const float* y;
  const float* coefficients;  // [3, C]
  int64_t cols;
  struct Params {
    typename GatedGradient<float, true, kGate>::Params gate;
    Pack<float> a, b, c;
  };

  FASTRES_INLINE void prefetch(int64_t at) const {
    prefetch_line(gradient.grad_out + at);
    if (kReadY || gradient.reads_y()) {
      prefetch_line(y + at);
    }
    if constexpr (kGate == Gating::kReluOfOutput) {
      prefetch_line((const float*)gradient.source + at);
    }
  }

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t col, Lanes lanes) const {
    Params p{gradient.params(col, lanes), load(coefficients + col, lanes), {}, {}};
    if constexpr (kReadY) {
      p.b = load(coefficients + cols + col, lanes);
      p.c = load(coefficients + 2 * cols + col, lanes);
    }
    return p;
  }
  template <class Lanes>
  FASTRES_INLINE Pack<float> value(int64_t row, int64_t col, const Params& p, Lanes lanes) const {
    Pack<float> v = broadcast(0.0f);
    if (kReadY || gradient.reads_y()) {
      v = load(y + row * cols + col, lanes);
    }
    const Pack<float> g = gradient.get(row, col, p.gate, lanes, v);
    if constexpr (kReadY) {
      return fma(p.a, g, fma(p.b, v, p.c));
    } else {
      return p.a * g;
    }
  }
};

// Calls f(source) with what a convolution reads.
template <class F>
void with_input(const ConvInput& input, int64_t channels, const F& f) {
  if (!input.scale) {
    return f(SourceOf(PlainPixels{input.x, channels}));
  }
  with_act<float>(input.act, [&](auto act) {
    f(SourceOf(ActivatedPixels<decltype(act)>{input.x, input.scale, input.shift, channels, act}));
  });
}

// Likewise with the gradient of a raw output.
template <class F>
void with_gradient(const BackwardApplyArgs& a, const F& f) {
  const int64_t channels = a.problem.c;
  if (!a.stats[0]) {
    return f(SourceOf(PlainPixels{(const float*)a.grad_out, channels}));
  }
  const Scratch<float> coefficients(3 * channels);
  fill_coefficients(a, 0, coefficients.data());
  with_gating(a.gate, a.act, [&](auto gate) {
    constexpr Gating kGate = decltype(gate)::value;
    with_flag(a.count != 0, [&](auto reads) {
      f(SourceOf(GradientPixels<kGate, decltype(reads)::value>{
          gated_gradient<float, true, kGate>(a), (const float*)a.y[0], coefficients.data(),
          channels}));
    });
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
