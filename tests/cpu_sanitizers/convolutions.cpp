// The CPU's convolutions under AddressSanitizer and UBSan: every tensor and every scratch array is
// an allocation of its own, of exactly its size, so that a step beyond any of them is seen. Values
// are small integers, and results are those of plain loops.
#include <cstdio>

#include "cpu/geometry.h"
#include "cpu/table.h"
#include "memory.h"

namespace fastres::cpu {
namespace {

namespace isa = FASTRES_ISA;

template <class T>
std::vector<float> floats(const std::vector<T>& values) {
  std::vector<float> all;
  for (const T& value : values) {
    all.push_back(to_acc(value));
  }
  return all;
}

// Calls f(output pixel, input pixel, tap) for every product of a convolution.
template <class F>
void each_product(const ConvShape& s, const F& f) {
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t i = 0; i < s.out_h(); ++i) {
      for (int64_t j = 0; j < s.out_w(); ++j) {
        for (int64_t tap = 0; tap < s.taps(); ++tap) {
          const int64_t h = i * s.sh + tap / s.kw * s.dh - s.ph;
          const int64_t w = j * s.sw + tap % s.kw * s.dw - s.pw;
          if (h >= 0 && h < s.h && w >= 0 && w < s.w) {
            f((n * s.out_h() + i) * s.out_w() + j, (n * s.h + h) * s.w + w, tap);
          }
        }
      }
    }
  }
}

int wrong = 0;

// b holds sums that are exact, and are rounded to T once.
template <class T>
void compare(const char* what, const ConvShape& s, const std::vector<T>& a,
             const std::vector<float>& b) {
  bool same = a.size() == b.size();
  for (size_t i = 0; i < a.size() && same; ++i) {
    same = to_acc(a[i]) == to_acc(FromAcc<T>::convert(b[i]));
  }
  if (!same) {
    std::printf("%s is wrong: n %ld c %ld h %ld w %ld k %ld kernel %ldx%ld\n", what, long(s.n),
                long(s.c), long(s.h), long(s.w), long(s.k), long(s.kh), long(s.kw));
    ++wrong;
  }
}

template <class T>
constexpr DType kDType = sizeof(T) == 2 ? DType::kBFloat16 : DType::kFloat32;

template <class T>
struct Case {
  ConvShape shape;
  int threads;
  bool packed, winograd;
  int64_t pixels, outputs, taps;
  std::vector<T> x, weight, grad;

  Case(const ConvShape& s, int threads, bool packed, bool winograd)
      : shape(s),
        threads(threads),
        packed(packed || winograd),
        winograd(winograd),
        pixels(s.n * s.h * s.w),
        outputs(s.n * s.out_h() * s.out_w()),
        taps(s.taps()),
        x(integers<T>(pixels * s.c)),
        weight(integers<T>(s.k * s.c * taps)),
        grad(integers<T>(outputs * s.k)) {
    shape.dtype = kDType<T>;
    if (winograd && threads == 1) {  // some panels are computed without squares
      // Sums with the product of both are exact in float32, whatever their order.
      x[x.size() / 2] = FromAcc<T>::convert(4096);
      grad[grad.size() / 2] = FromAcc<T>::convert(1024);
    }
  }

  ConvWeight view() const {
    return {weight.data(), taps * shape.c, 1, shape.kw * shape.c, shape.c};
  }
  float w(int64_t k, int64_t tap, int64_t c) const {
    return to_acc(weight[size_t((k * taps + tap) * shape.c + c)]);
  }

  std::vector<float> pack(bool transposed) const {
    const int64_t size = packed ? isa::packed_size<T>(shape, transposed) : 0;
    std::vector<float> to(static_cast<size_t>(size));
#ifndef __AVX512BF16__
    if (winograd) {
      to.resize(size_t(isa::winograd_size(shape, transposed)));
      isa::pack_winograd({view(), transposed, to.data(), shape, threads});
      return to;
    }
#endif
    if (packed) {
      isa::pack_weight<T>({view(), transposed, to.data(), shape, threads});
    }
    return to;
  }

  BackwardApplyArgs formed() const {
    BackwardApplyArgs args{};
    args.grad_out = grad.data();
    args.problem = {
        {shape.n, shape.k, shape.out_h() * shape.out_w(), Layout::kChannelsLast, shape.dtype},
        threads};
    return args;
  }

  void forward() const {
    const std::vector<float> to = pack(false), scale(size_t(shape.c), 2),
                             shift(size_t(shape.c), -1);
    std::vector<T> y(size_t(outputs * shape.k));
    std::vector<float> expected(y.size());
    std::vector<double> state(size_t(2 * shape.k));
    ConvForwardArgs args{};
    args.input = {x.data(), scale.data(), shift.data(), Activation::kRelu};
    args.weight = view();
    args.packed = packed ? to.data() : nullptr;
    args.winograd = winograd;
    args.y = y.data();
    args.state = state.data();
    args.shape = shape;
    args.threads = threads;
    isa::conv_forward<T>(args);
    each_product(shape, [&](int64_t out, int64_t in, int64_t tap) {
      for (int64_t k = 0; k < shape.k; ++k) {
        for (int64_t c = 0; c < shape.c; ++c) {
          const float z = 2 * to_acc(x[size_t(in * shape.c + c)]) - 1;
          expected[size_t(out * shape.k + k)] += (z < 0 ? 0 : z) * w(k, tap, c);
        }
      }
    });
    compare("y", shape, y, expected);
  }

  void data_gradient() const {
    const std::vector<float> to = pack(true), stats(size_t(5 * shape.c), 1);
    std::vector<T> grad_x = integers<T>(pixels * shape.c);
    std::vector<float> expected = floats(grad_x);
    std::vector<double> sums(size_t(2 * shape.c));
    ConvDataArgs args{};
    args.grad = formed();
    args.weight = view();
    args.packed = packed ? to.data() : nullptr;
    args.winograd = winograd;
    args.grad_x = grad_x.data();
    args.accumulate = true;
    args.reduce.grad_out = grad_x.data();
    args.reduce.gate = Gate::kAffine;
    args.reduce.act = Activation::kRelu;
    args.reduce.y[0] = x.data();
    args.reduce.stats[0] = stats.data();
    args.reduce.sums = sums.data();
    args.reduce.problem = {
        {shape.n, shape.c, shape.h * shape.w, Layout::kChannelsLast, shape.dtype}, threads};
    args.shape = shape;
    args.threads = threads;
    isa::conv_backward_data<T>(args);
    each_product(shape, [&](int64_t out, int64_t in, int64_t tap) {
      for (int64_t k = 0; k < shape.k; ++k) {
        for (int64_t c = 0; c < shape.c; ++c) {
          expected[size_t(in * shape.c + c)] +=
              to_acc(grad[size_t(out * shape.k + k)]) * w(k, tap, c);
        }
      }
    });
    compare("grad_x", shape, grad_x, expected);
  }

  void weight_gradient() const {
    std::vector<T> grad_weight(weight.size());
    std::vector<float> expected(weight.size());
    isa::conv_backward_weight<T>({formed(),
                                  {x.data(), nullptr, nullptr, Activation::kNone},
                                  grad_weight.data(),
                                  shape,
                                  threads,
                                  winograd});
    each_product(shape, [&](int64_t out, int64_t in, int64_t tap) {
      for (int64_t k = 0; k < shape.k; ++k) {
        for (int64_t c = 0; c < shape.c; ++c) {
          expected[size_t((k * taps + tap) * shape.c + c)] +=
              to_acc(grad[size_t(out * shape.k + k)]) * to_acc(x[size_t(in * shape.c + c)]);
        }
      }
    });
    compare("grad_weight", shape, grad_weight, expected);
  }
};

// n, h, w, c, k, kernel, strides, paddings, dilations.
const ConvShape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1},     {3, 5, 9, 5, 7, 3, 3, 1, 1, 1, 1, 1, 1},
    {2, 9, 7, 20, 130, 3, 3, 2, 2, 1, 1, 1, 1},  {2, 17, 15, 3, 17, 7, 7, 2, 2, 3, 3, 1, 1},
    {1, 7, 7, 130, 33, 3, 3, 1, 1, 2, 2, 2, 2},  {2, 5, 6, 40, 17, 1, 1, 2, 2, 0, 0, 1, 1},
    {2, 10, 6, 17, 19, 1, 1, 3, 1, 2, 2, 1, 1},  {1, 3, 3, 8, 8, 3, 3, 3, 3, 1, 1, 1, 1},
    {2, 6, 6, 20, 33, 2, 2, 2, 3, 1, 1, 1, 1},   {2, 9, 9, 70, 65, 3, 3, 2, 2, 1, 1, 2, 2},
    {1, 4, 4, 1100, 10, 1, 1, 1, 1, 0, 0, 1, 1}, {2, 4, 4, 4, 6, 5, 5, 1, 1, 4, 4, 1, 1},
    {3, 16, 15, 16, 24, 3, 3, 1, 1, 1, 1, 1, 1}, {7, 9, 11, 9, 65, 1, 1, 1, 1, 0, 0, 1, 1},
    {3, 7, 9, 33, 35, 3, 3, 1, 1, 1, 1, 1, 1},   {1, 5, 5, 17, 130, 3, 3, 1, 1, 2, 2, 1, 1},
    {2, 4, 3, 20, 8, 3, 3, 1, 1, 4, 4, 1, 1},    {2, 8, 5, 8, 70, 3, 3, 1, 1, 0, 0, 1, 1},
    {1, 41, 30, 40, 33, 3, 3, 1, 1, 1, 1, 1, 1}, {2, 5, 6, 600, 20, 3, 3, 1, 1, 1, 1, 1, 1},
};

template <class T>
void check(const ConvShape& shape, int threads, bool packed, bool winograd) {
  const Case<T> given(shape, threads, packed, winograd);
  given.forward();
  given.data_gradient();
  given.weight_gradient();
}

}  // namespace
}  // namespace fastres::cpu

int main() {
  using namespace fastres::cpu;
  for (const ConvShape& shape : kShapes) {
    for (int threads = 1; threads <= 3; ++threads) {
      check<fastres::BFloat16>(shape, threads, threads != 2, false);
#ifndef __AVX512BF16__  // which has nothing of its own for float32
      check<float>(shape, threads, threads != 2, false);
      if (is_winograd(shape)) {
        check<float>(shape, threads, true, true);
      }
#endif
    }
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
