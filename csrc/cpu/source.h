// What a convolution reads, formed panel by panel: pixels of an activation with their normalisation
// and activation, or of a gradient with its gate and its batch norm's backward.
#pragma once

#include <vector>

#include "cpu/activation.h"
#include "cpu/gate.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"

namespace fastres::cpu::FASTRES_ISA {

// Memory that will be read soon, asked for line by line while tiles compute: many lines at once
// would hold up the tile's own reads.
class Ahead {
 public:
  void clear() {
    ranges_.clear();
    current_ = 0;
  }

  // Columns of so many values, of the pixels [begin, end).
  template <class T>
  void ask(const T* tensor, Range pixels, int64_t cols) {
    const int64_t bytes = cols * int64_t(sizeof(T));
    const char* begin = (const char*)tensor + pixels.begin * bytes;
    if (tensor && pixels.begin < pixels.end) {
      ranges_.push_back({begin, begin + (pixels.end - pixels.begin) * bytes});
    }
  }

  // All of it is asked for by so many tiles.
  void spread(int64_t tiles) {
    int64_t bytes = 0;
    for (const Bytes& range : ranges_) {
      bytes += range.end - range.at;
    }
    each_ = ceil_div(bytes, at_least(1, tiles));
  }

  // One tile's part, over so many steps of k.
  template <class E, class T>
  FASTRES_INLINE void give(Tile<E, T>& tile, int64_t depth) {
    tile.ahead = (const char*)tile.c[0];
    tile.ahead_step = 0;
    if (current_ < ranges_.size()) {
      Bytes& range = ranges_[current_];
      const int64_t bytes = at_most(each_, range.end - range.at);
      tile.ahead = range.at;
      tile.ahead_step = ceil_div(bytes, at_least(1, depth));
      range.at += bytes;
      current_ += range.at >= range.end;
    }
  }

 private:
  struct Bytes {
    const char *at, *end;
  };
  std::vector<Bytes> ranges_;
  size_t current_ = 0;
  int64_t each_ = 0;
};

// Columns [begin, end) of the pixels [first, last), to rows `stride` values apart, float or
// bfloat16. A row has room for `width` of them: those of its last pack beyond the last column
// become zero.
template <class F = float>
class Source {
 public:
  virtual ~Source() = default;
  virtual void form(Range pixels, Range columns, F* to, int64_t stride, int64_t width) const = 0;
  // Asks for all that pixels are formed from.
  virtual void ask(Range pixels, Ahead& ahead) const = 0;
};

// What a T would hold of a value, as an operand. AVX512-BF16 multiplies subnormal numbers as zeros,
// so that it may as well round them to zero.
template <class T, class Lanes>
FASTRES_INLINE void put(float* to, const Pack<float>& v, Lanes lanes) {
  store(to, rounded<T>(v), lanes);
}
#if defined(__AVX512BF16__)
template <class T, class Lanes>
FASTRES_INLINE void put(BFloat16* to, const Pack<float>& v, Lanes lanes) {
  store_16bit(to, (__m256i)_mm512_cvtneps_pbh(v.v[0]), lanes);
}
#endif

// Op: `Stored`, `params(col, lanes)`, `value(row, col, params, lanes)`, and `ask(pixels, ahead)`.
template <class Op>
class SourceOf final : public Source<Formed<Operand<typename Op::Stored>>> {
  using T = typename Op::Stored;
  using F = Formed<Operand<T>>;

 public:
  explicit SourceOf(const Op& op) : op_(op) {}

  // Columns outside, so that their values per channel stay in registers; the pixels come from L2.
  void form(Range pixels, Range columns, F* to, int64_t stride, int64_t width) const override {
    const Op op = op_;  // of our own: no store can change it
    int64_t col = columns.begin;
    for (; col + kAtOnce * kPack <= columns.end; col += kAtOnce * kPack, to += kAtOnce * kPack) {
      form_packs<kAtOnce>(op, pixels, col, to, stride);
    }
    for (; col + kPack <= columns.end; col += kPack, to += kPack) {
      form_packs<1>(op, pixels, col, to, stride);
    }
    if (col < columns.end) {
      const Part rest{int(columns.end - col)};
      const Part room{int(at_most(kPack, width - (col - columns.begin)))};
      const auto params = op.params(col, rest);
      for (int64_t row = pixels.begin; row < pixels.end; ++row, to += stride) {
        const Pack<float> v = op.value(row, col, params, rest);
        if (room.n == kPack) {
          put<T>(to, existing(rest, v), Full{});
        } else {
          put<T>(to, existing(rest, v), room);
        }
      }
    }
  }

  void ask(Range pixels, Ahead& ahead) const override { op_.ask(pixels, ahead); }

 private:
  static constexpr int kAtOnce = 2;

  template <int kPacks>
  static FASTRES_INLINE void form_packs(const Op& op, Range pixels, int64_t col, F* to,
                                        int64_t stride) {
    typename Op::Params params[kPacks];
    FASTRES_UNROLL
    for (int i = 0; i < kPacks; ++i) {
      params[i] = op.params(col + i * kPack, Full{});
    }
    for (int64_t row = pixels.begin; row < pixels.end; ++row, to += stride) {
      FASTRES_UNROLL
      for (int i = 0; i < kPacks; ++i) {
        put<T>(to + i * kPack, op.value(row, col + i * kPack, params[i], Full{}), Full{});
      }
    }
  }

  Op op_;
};

template <class T>
struct PlainPixels {
  using Stored = T;
  const T* x;
  int64_t cols;
  struct Params {};

  void ask(Range pixels, Ahead& ahead) const { ahead.ask(x, pixels, cols); }

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t, Lanes) const {
    return {};
  }
  template <class Lanes>
  FASTRES_INLINE Pack<float> value(int64_t row, int64_t col, const Params&, Lanes lanes) const {
    return load(x + row * cols + col, lanes);
  }
};

template <class T, class Act>
struct ActivatedPixels {
  using Stored = T;
  const T* x;
  const float *scale, *shift;
  int64_t cols;
  Act act;
  struct Params {
    Pack<float> scale, shift;
  };

  void ask(Range pixels, Ahead& ahead) const { ahead.ask(x, pixels, cols); }

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
template <class T, Gating kGate, bool kReadY>
struct GradientPixels {
  using Stored = T;
  GatedGradient<T, true, kGate> gradient;
  const T* y;
  const float* coefficients;  // [3, C]
  int64_t cols;
  struct Params {
    typename GatedGradient<T, true, kGate>::Params gate;
    Pack<float> a, b, c;
  };

  void ask(Range pixels, Ahead& ahead) const {
    ahead.ask(gradient.grad_out, pixels, cols);
    if (kReadY || gradient.reads_y()) {
      ahead.ask(y, pixels, cols);
    }
    if constexpr (kGate == Gating::kReluOfOutput) {
      ahead.ask((const T*)gradient.source, pixels, cols);
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

// Calls f(source) with what a convolution of tensors of T reads.
template <class T, class F>
void with_input(const ConvInput& input, int64_t channels, const F& f) {
  const T* x = (const T*)input.x;
  if (!input.scale) {
    return f(SourceOf(PlainPixels<T>{x, channels}));
  }
  with_act<float>(input.act, [&](auto act) {
    f(SourceOf(ActivatedPixels<T, decltype(act)>{x, input.scale, input.shift, channels, act}));
  });
}

// Likewise with the gradient of a raw output.
template <class T, class F>
void with_gradient(const BackwardApplyArgs& a, const F& f) {
  const int64_t channels = a.problem.c;
  if (!a.stats[0]) {
    return f(SourceOf(PlainPixels<T>{(const T*)a.grad_out, channels}));
  }
  const Scratch<float> coefficients(3 * channels);
  fill_coefficients(a, 0, coefficients.data());
  with_gating(a.gate, a.act, [&](auto gate) {
    constexpr Gating kGate = decltype(gate)::value;
    with_flag(a.count != 0, [&](auto reads) {
      f(SourceOf(GradientPixels<T, kGate, decltype(reads)::value>{
          gated_gradient<T, true, kGate>(a), (const T*)a.y[0], coefficients.data(), channels}));
    });
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
