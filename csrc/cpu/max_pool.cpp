// out = the maximum over windows of act(scale * y + shift), rounded to what it would be stored as,
// and its backward. Neither stores what is pooled: forward forms a value anew for each window.
#include <algorithm>
#include <limits>
#include <numeric>

#include "cpu/activation.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/table.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

// Calls f(channel, lanes) for each pack of a pixel's channels.
template <class F>
FASTRES_INLINE void each_pack(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kPack <= channels; c += kPack) {
    f(c, Full{});
  }
  if (c < channels) {
    f(c, Part{int(channels - c)});
  }
}

// ---- taps as bytes ----

template <class A, class Lanes>
FASTRES_INLINE void store_taps(uint8_t* p, const Pack<A>& taps, Lanes lanes) {
  A buffer[kPack];
  store(buffer, taps, Full{});
  for (int i = 0; i < lanes.n; ++i) {
    p[i] = uint8_t(int32_t(buffer[i]));
  }
}

// Bits of the bytes that are `tap`; those of lanes that do not exist may be anything.
template <class Lanes>
FASTRES_INLINE uint32_t equal_bytes(const uint8_t* p, uint8_t tap, Lanes lanes) {
  uint8_t bytes[kPack] = {};
  memcpy(bytes, p, size_t(lanes.n));
#if defined(__x86_64__)
  const __m128i all = _mm_loadu_si128((const __m128i*)bytes);
  return uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(all, _mm_set1_epi8(char(tap)))));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kPack; ++i) {
    bits |= uint32_t(bytes[i] == tap) << i;
  }
  return bits;
#endif
}

// ---- forward ----

// The taps of a window along an axis that lie within the image.
FASTRES_INLINE Range taps_within(int64_t start, int64_t step, int64_t taps, int64_t size) {
  if (start >= 0 && start + (taps - 1) * step < size) {
    return {0, taps};
  }
  const int64_t first = start < 0 ? ceil_div(-start, step) : 0;
  const int64_t end = start < size ? at_most(taps, ceil_div(size - start, step)) : 0;
  return {first, end};
}

template <class T, class Act>
struct ScaleShiftActPool {
  using A = Acc<T>;
  const T* y;
  const A *scale, *shift;
  T* out;
  uint8_t* argmax;
  Act act;
  PoolShape s;

  // A NaN wins over all before it, and of equal values the first, as in torch.
  template <class Lanes>
  FASTRES_INLINE void pack(int64_t first, Range rows, Range cols, int64_t at, int64_t c,
                           Lanes lanes) const {
    const Pack<A> p_scale = load(scale + c, lanes), p_shift = load(shift + c, lanes);
    Pack<A> best = broadcast(-std::numeric_limits<A>::infinity());
    Pack<A> tap = broadcast(A(rows.begin * s.kw + cols.begin));
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t j = cols.begin; j < cols.end; ++j) {
        const int64_t from = first + (i * s.dh * s.w + j * s.dw) * s.c + c;
        const Pack<A> v = rounded<T>(act.value(fma(p_scale, load(y + from, lanes), p_shift)));
        const GateLanes<A> wins = either(less(best, v), not_le(v, v));
        best = select(wins, v, best);
        tap = select(wins, broadcast(A(i * s.kw + j)), tap);
      }
    }
    store(out + at + c, best, lanes);
    if (argmax) {
      store_taps(argmax + at + c, tap, lanes);
    }
  }

  // One row of output pixels.
  void row(int64_t index) const {
    const int64_t n = index / s.out_h, top = index % s.out_h * s.sh - s.ph;
    const Range rows = taps_within(top, s.dh, s.kh, s.h);
    for (int64_t j = 0; j < s.out_w; ++j) {
      const int64_t left = j * s.sw - s.pw;
      const Range cols = taps_within(left, s.dw, s.kw, s.w);
      // Where the window's first tap is, or would be.
      const int64_t first = ((n * s.h + top) * s.w + left) * s.c;
      const int64_t at = (index * s.out_w + j) * s.c;
      each_pack(s.c, [&](int64_t c, auto lanes) { pack(first, rows, cols, at, c, lanes); });
    }
  }
};

// ---- backward ----

// A window that a pixel of an axis is in, and as which of its taps.
struct Window {
  int64_t index, tap;
};

// For each pixel of an axis the windows that it is in, in their order.
class Windows {
 public:
  struct Few {
    const Window *first, *last;
    FASTRES_INLINE const Window* begin() const { return first; }
    FASTRES_INLINE const Window* end() const { return last; }
  };

  Windows(int64_t size, int64_t windows, int64_t taps, int64_t stride, int64_t padding,
          int64_t dilation)
      : begins_memory_(size + 1),
        all_memory_(at_least(1, windows * taps)),
        begins_(begins_memory_.data()),
        all_(all_memory_.data()) {
    const auto each = [&](const auto& f) {
      for (int64_t window = 0; window < windows; ++window) {
        const int64_t start = window * stride - padding;
        const Range within = taps_within(start, dilation, taps, size);
        for (int64_t tap = within.begin; tap < within.end; ++tap) {
          f(start + tap * dilation, Window{window, tap});
        }
      }
    };
    std::fill(begins_, begins_ + size + 1, 0);
    each([&](int64_t pixel, Window) { ++begins_[pixel]; });
    // Each beginning is the sum of all counts up to its own: filling from behind moves it there.
    std::partial_sum(begins_, begins_ + size + 1, begins_);
    each([&](int64_t pixel, Window one) { all_[--begins_[pixel]] = one; });
    for (int64_t pixel = 0; pixel < size; ++pixel) {
      std::reverse(all_ + begins_[pixel], all_ + begins_[pixel + 1]);
    }
  }

  FASTRES_INLINE Few of(int64_t pixel) const {
    return {all_ + begins_[pixel], all_ + begins_[pixel + 1]};
  }

 private:
  Scratch<int64_t> begins_memory_;
  Scratch<Window> all_memory_;
  int64_t* begins_;
  Window* all_;
};

template <class T>
struct MaxPoolBackward {
  using A = Acc<T>;
  const T* grad_out;
  const uint8_t* argmax;
  T* grad;
  PoolShape s;
  const Windows &vertical, &horizontal;

  // One row of pixels. Windows are added in their order, whatever the number of threads.
  void row(int64_t index) const {
    const int64_t n = index / s.h;
    const Windows::Few above = vertical.of(index % s.h);
    for (int64_t w = 0; w < s.w; ++w) {
      const Windows::Few beside = horizontal.of(w);
      T* to = grad + (index * s.w + w) * s.c;
      each_pack(s.c, [&](int64_t c, auto lanes) {
        Pack<A> sum = broadcast(A(0));
        for (const Window& i : above) {
          for (const Window& j : beside) {
            const int64_t at = ((n * s.out_h + i.index) * s.out_w + j.index) * s.c + c;
            const uint8_t tap = uint8_t(i.tap * s.kw + j.tap);
            const uint32_t bits = equal_bytes(argmax + at, tap, lanes);
            sum = sum + keep(gate_of_bits<A>(bits), load(grad_out + at, lanes));
          }
        }
        store(to + c, sum, lanes);
      });
    }
  }
};

template <class T, class Op>
void each_row(const Op& op, int64_t rows, int threads) {
  const int64_t bytes = (op.s.inputs() + op.s.outputs()) * int64_t(sizeof(T));
  parallel(threads, bytes, [&](Worker worker) {
    const Range mine = worker.share(rows);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      op.row(row);
    }
  });
}

}  // namespace

void scale_shift_act_pool(const ScaleShiftActPoolArgs& a) {
  if (a.shape.outputs() == 0) {
    return;
  }
  with_dtype(a.shape.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    using A = Acc<T>;
    with_act<A>(a.act, [&](auto act) {
      const ScaleShiftActPool<T, decltype(act)> op{
          (const T*)a.y, (const A*)a.scale, (const A*)a.shift, (T*)a.out, a.argmax, act, a.shape};
      each_row<T>(op, a.shape.n * a.shape.out_h, a.threads);
    });
  });
}

void max_pool_backward(const MaxPoolBackwardArgs& a) {
  const PoolShape& s = a.shape;
  if (s.inputs() == 0) {
    return;
  }
  const Windows vertical(s.h, s.out_h, s.kh, s.sh, s.ph, s.dh);
  const Windows horizontal(s.w, s.out_w, s.kw, s.sw, s.pw, s.dw);
  with_dtype(s.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    const MaxPoolBackward<T> op{
        (const T*)a.grad_out, a.argmax, (T*)a.grad, s, vertical, horizontal};
    each_row<T>(op, s.n * s.h, a.threads);
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
