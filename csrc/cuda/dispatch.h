// From codes known at run time to the instance of a kernel.
#pragma once

#include <initializer_list>

#include "cuda/tile_iteration.h"

namespace fastres::cuda {

template <class T>
struct Type {
  using type = T;
};
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// Whether packs are vectors: whole ones in every row, and every tensor begins at a multiple of 16
// bytes. Null pointers are absent tensors.
inline bool vectorised(const Activations& shape, std::initializer_list<const void*> tensors) {
  return shape.cols() % kVector == 0 &&
         std::all_of(tensors.begin(), tensors.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

template <class F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kBFloat16:
      return f(Type<BFloat16>{});
    case DType::kFloat16:
      return f(Type<Float16>{});
    default:
      throw std::invalid_argument("dtype must be float32, bfloat16 or float16");
  }
}

// Of 16 bits.
template <class F>
void with_half(DType dtype, const F& f) {
  dtype == DType::kBFloat16 ? f(Type<BFloat16>{}) : f(Type<Float16>{});
}

template <class F>
void with_bool(bool value, const F& f) {
  value ? f(Constant<true>{}) : f(Constant<false>{});
}

// Calls f(type, pack, per_column) with the three as constants.
template <class F>
void with_instance(const Activations& shape, bool vectors, const F& f) {
  with_dtype(shape.dtype, [&](auto type) {
    with_bool(shape.per_column(), [&](auto per_column) {
      vectors ? f(type, Constant<kVector>{}, per_column) : f(type, Constant<1>{}, per_column);
    });
  });
}

}  // namespace fastres::cuda
