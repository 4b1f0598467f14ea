// out = act(scale * y + shift [+ residual | + residual_scale * residual + residual_shift])
#include "cpu/matrix.h"
#include "cpu/table.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

enum class Residual { kNone, kPlain, kAffine };

template <class T, bool kPerColumn, Residual kResidual, bool kRelu>
struct ScaleShiftAct {
  using A = Acc<T>;
  const T* y;
  const A *scale, *shift;
  const T* residual;
  const A *residual_scale, *residual_shift;
  T* out;
  uint8_t* mask;
  int64_t cols, mask_stride;

  struct Params {
    Pack<A> scale, shift, residual_scale;
  };

  template <class Lanes>
  FASTRES_INLINE Params params(int64_t channel, Lanes lanes) const {
    Params p;
    p.scale = parameter<kPerColumn>(scale, channel, lanes);
    p.shift = parameter<kPerColumn>(shift, channel, lanes);
    if constexpr (kResidual == Residual::kAffine) {
      p.residual_scale = parameter<kPerColumn>(residual_scale, channel, lanes);
      p.shift = p.shift + parameter<kPerColumn>(residual_shift, channel, lanes);
    }
    return p;
  }

  template <class Lanes>
  FASTRES_INLINE void apply(int64_t row, int64_t col, const Params& p, Lanes lanes) const {
    const int64_t at = row * cols + col;
    Pack<A> v = fma(p.scale, load(y + at, lanes), p.shift);
    if constexpr (kResidual == Residual::kPlain) {
      v = v + load(residual + at, lanes);
    } else if constexpr (kResidual == Residual::kAffine) {
      v = fma(p.residual_scale, load(residual + at, lanes), v);
    }
    if (mask) {
      uint32_t bits = 0xffffu;
      if constexpr (kRelu) {
        bits = bits_of(not_le(v, broadcast(RoundsToZero<T>::bound())));
      }
      store_bits(mask + row * mask_stride + col / 8, bits, lanes);
    }
    if constexpr (kRelu) {
      v = relu(v);
    }
    store(out + at, v, lanes);
  }
};

template <class T, bool kPerColumn, Residual kResidual, bool kRelu>
void run(const ScaleShiftActArgs& a) {
  using A = Acc<T>;
  const Matrix m = matrix_of(a.problem);
  const ScaleShiftAct<T, kPerColumn, kResidual, kRelu> op{(const T*)a.y,
                                                          (const A*)a.scale,
                                                          (const A*)a.shift,
                                                          (const T*)a.residual,
                                                          (const A*)a.residual_scale,
                                                          (const A*)a.residual_shift,
                                                          (T*)a.out,
                                                          a.mask,
                                                          m.cols,
                                                          ceil_div(m.cols, 8)};
  const int64_t tensors = kResidual == Residual::kNone ? 2 : 3;
  parallel(a.problem.threads, a.problem.numel() * int64_t(sizeof(T)) * tensors,
           [&](Worker worker) { map_matrix<kPerColumn>(op, m, worker); });
}

}  // namespace

void scale_shift_act(const ScaleShiftActArgs& a) {
  if (a.problem.numel() == 0) {
    return;
  }
  with_dtype(a.problem.dtype, [&](auto dtype) {
    with_flag(a.problem.per_column(), [&](auto per_column) {
      with_flag(a.act == Activation::kRelu, [&](auto relu) {
        using T = typename decltype(dtype)::type;
        constexpr bool kPerColumn = decltype(per_column)::value;
        constexpr bool kRelu = decltype(relu)::value;
        if (!a.residual) {
          run<T, kPerColumn, Residual::kNone, kRelu>(a);
        } else if (!a.residual_scale) {
          run<T, kPerColumn, Residual::kPlain, kRelu>(a);
        } else {
          run<T, kPerColumn, Residual::kAffine, kRelu>(a);
        }
      });
    });
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
