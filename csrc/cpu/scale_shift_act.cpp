// out = act(scale * y + shift [+ residual | + residual_scale * residual + residual_shift])
#include "cpu/activation.h"
#include "cpu/matrix.h"
#include "cpu/table.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

enum class Residual { kNone, kPlain, kAffine };

template <class T, bool kPerColumn, Residual kResidual, class Act>
struct ScaleShiftAct {
  using A = Acc<T>;
  const T* y;
  const A *scale, *shift;
  const T* residual;
  const A *residual_scale, *residual_shift;
  T* out;
  uint8_t* mask;
  int64_t cols, mask_stride;
  Act act;

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
      store_bits(mask + row * mask_stride + col / 8, act.template bits<T>(v), lanes);
    }
    store(out + at, act.value(v), lanes);
  }
};

template <class T, bool kPerColumn, Residual kResidual, class Act>
void run(const ScaleShiftActArgs& a, const Act& act) {
  using A = Acc<T>;
  const Matrix m = matrix_of(a.problem);
  const ScaleShiftAct<T, kPerColumn, kResidual, Act> op{(const T*)a.y,
                                                        (const A*)a.scale,
                                                        (const A*)a.shift,
                                                        (const T*)a.residual,
                                                        (const A*)a.residual_scale,
                                                        (const A*)a.residual_shift,
                                                        (T*)a.out,
                                                        a.mask,
                                                        m.cols,
                                                        ceil_div(m.cols, 8),
                                                        act};
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
      using T = typename decltype(dtype)::type;
      with_act<Acc<T>>(a.act, [&](auto act) {
        constexpr bool kPerColumn = decltype(per_column)::value;
        if (!a.residual) {
          run<T, kPerColumn, Residual::kNone>(a, act);
        } else if (!a.residual_scale) {
          run<T, kPerColumn, Residual::kPlain>(a, act);
        } else {
          run<T, kPerColumn, Residual::kAffine>(a, act);
        }
      });
    });
  });
}

}  // namespace fastres::cpu::FASTRES_ISA
