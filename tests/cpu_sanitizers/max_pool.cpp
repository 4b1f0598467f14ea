// The CPU's max pooling under AddressSanitizer and UBSan: every tensor is an allocation of its own,
// of exactly its size, so that a step beyond any of them is seen. Values are small integers, full
// of ties, and results are those of plain loops.
#include <cstdio>

#include "cpu/table.h"
#include "memory.h"

namespace fastres::cpu {
namespace {

namespace isa = FASTRES_ISA;

int wrong = 0;

void expect(bool right, const char* what, const PoolShape& s) {
  if (!right) {
    std::printf("%s is wrong: n %ld c %ld h %ld w %ld kernel %ldx%ld\n", what, long(s.n), long(s.c),
                long(s.h), long(s.w), long(s.kh), long(s.kw));
    ++wrong;
  }
}

template <class T>
struct Case {
  using A = Acc<T>;
  PoolShape s;
  int threads;
  std::vector<T> y, out, grad_out, grad;
  std::vector<uint8_t> argmax;

  Case(const PoolShape& shape, DType dtype, int threads)
      : s(shape),
        threads(threads),
        y(integers<T>(s.inputs())),
        out(size_t(s.outputs())),
        grad_out(integers<T>(s.outputs())),
        grad(size_t(s.inputs())),
        argmax(size_t(s.outputs())) {
    s.dtype = dtype;
  }

  // Calls f(input, tap) for the taps of one output, in their order.
  template <class F>
  void each_tap(int64_t at, const F& f) const {
    const int64_t c = at % s.c, j = at / s.c % s.out_w, i = at / s.c / s.out_w % s.out_h;
    const int64_t n = at / s.c / s.out_w / s.out_h;
    for (int64_t tap = 0; tap < s.kh * s.kw; ++tap) {
      const int64_t h = i * s.sh + tap / s.kw * s.dh - s.ph;
      const int64_t w = j * s.sw + tap % s.kw * s.dw - s.pw;
      if (h >= 0 && h < s.h && w >= 0 && w < s.w) {
        f(size_t(((n * s.h + h) * s.w + w) * s.c + c), tap);
      }
    }
  }

  void run(Activation act) {
    const std::vector<A> scale(size_t(s.c), 2), shift(size_t(s.c), -1);
    isa::scale_shift_act_pool(
        {y.data(), scale.data(), shift.data(), out.data(), argmax.data(), act, s, threads});
    isa::max_pool_backward({grad_out.data(), argmax.data(), grad.data(), s, threads});
    std::vector<A> expected(grad.size());
    for (size_t at = 0; at < out.size(); ++at) {
      bool found = false;
      A best = 0;
      int64_t which = 0;
      size_t from = 0;
      each_tap(int64_t(at), [&](size_t input, int64_t tap) {
        const A v = 2 * to_acc(y[input]) - 1;
        const A z = act == Activation::kRelu && v < 0 ? 0 : v;
        if (!found || z > best) {
          found = true, best = z, which = tap, from = input;
        }
      });
      expect(to_acc(out[at]) == best && argmax[at] == which, "out", s);
      expected[from] += to_acc(grad_out[at]);
    }
    for (size_t i = 0; i < grad.size(); ++i) {
      expect(to_acc(grad[i]) == expected[i], "grad", s);
    }
  }
};

// n, c, h, w, outputs, kernel, strides, paddings, dilations.
const PoolShape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, {}},
    {2, 5, 1, 1, 1, 1, 3, 3, 2, 2, 1, 1, 1, 1, {}},
    {3, 17, 7, 6, 4, 3, 3, 3, 2, 2, 1, 1, 1, 1, {}},
    {2, 64, 9, 11, 5, 6, 3, 3, 2, 2, 1, 1, 1, 1, {}},
    {2, 16, 5, 4, 2, 2, 2, 2, 2, 2, 0, 0, 1, 1, {}},
    {1, 33, 5, 7, 3, 3, 3, 2, 2, 3, 1, 0, 1, 1, {}},
    {2, 3, 8, 6, 6, 5, 2, 3, 1, 1, 0, 1, 2, 1, {}},
    {1, 19, 6, 9, 2, 3, 1, 2, 3, 4, 0, 0, 1, 1, {}},
    {2, 100, 4, 5, 4, 5, 5, 5, 1, 1, 2, 2, 1, 1, {}},
    {1, 8, 15, 17, 15, 9, 15, 17, 1, 2, 7, 8, 1, 1, {}},
    {9, 48, 21, 20, 11, 10, 3, 3, 2, 2, 1, 1, 1, 1, {}},
};

template <class T>
void check(const PoolShape& shape, DType dtype, int threads) {
  Case<T> given(shape, dtype, threads);
  given.run(Activation::kRelu);
  given.run(Activation::kNone);
}

}  // namespace
}  // namespace fastres::cpu

int main() {
  using namespace fastres::cpu;
  for (const PoolShape& shape : kShapes) {
    for (int threads = 1; threads <= 3; ++threads) {
      check<float>(shape, fastres::DType::kFloat32, threads);
      check<double>(shape, fastres::DType::kFloat64, threads);
      check<fastres::BFloat16>(shape, fastres::DType::kBFloat16, threads);
      check<fastres::Float16>(shape, fastres::DType::kFloat16, threads);
    }
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
