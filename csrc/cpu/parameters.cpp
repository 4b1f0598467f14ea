// What is done to parameters: small, and on the calling thread.
#include <cstring>

#include "cpu/kernels.h"

namespace fastres::cpu {
namespace {

template <class From, class To>
void copy_as(const CopyArgs& a) {
  const From* from = static_cast<const From*>(a.from);
  To* to = static_cast<To*>(a.to);
  for (int64_t i = 0; i < a.shape[0]; ++i) {
    for (int64_t j = 0; j < a.shape[1]; ++j) {
      for (int64_t k = 0; k < a.shape[2]; ++k) {
        const int64_t read = i * a.from_strides[0] + j * a.from_strides[1] + k * a.from_strides[2];
        const int64_t write = i * a.to_strides[0] + j * a.to_strides[1] + k * a.to_strides[2];
        for (int64_t l = 0; l < a.shape[3]; ++l) {
          to[write + l * a.to_strides[3]] =
              FromAcc<To>::convert(Acc<To>(to_acc(from[read + l * a.from_strides[3]])));
        }
      }
    }
  }
}

// Calls f(T{}) with what a dtype is.
template <class F>
void with_dtype(DType dtype, const F& f) {
  dtype == DType::kFloat64 ? f(double{}) : dtype == DType::kBFloat16 ? f(BFloat16{}) : f(float{});
}

}  // namespace

void copy(const CopyArgs& a) {
  with_dtype(a.from_dtype, [&](auto from) {
    with_dtype(a.to_dtype, [&](auto to) { copy_as<decltype(from), decltype(to)>(a); });
  });
}

int64_t sample_weight(const void* weight, DType dtype, const int64_t* shape,
                      const int64_t* strides) {
  const int64_t bytes = dtype == DType::kBFloat16 ? 2 : 4;
  const bool empty = shape[1] * shape[2] * shape[3] == 0;
  uint64_t sum = 14695981039346656037u;      // FNV-1a
  int64_t channel = 0, row = 0, column = 0;  // the next channel's sample is at the next place
  for (int64_t k = 0; k < shape[0] && !empty; ++k) {
    const int64_t offset =
        k * strides[0] + channel * strides[1] + row * strides[2] + column * strides[3];
    uint32_t bits = 0;
    memcpy(&bits, static_cast<const char*>(weight) + offset * bytes, size_t(bytes));
    sum = (sum ^ bits) * 1099511628211u;
    if (++channel == shape[1]) {
      channel = 0;
      column = column + 1 == shape[3] ? 0 : column + 1;
      row = column > 0 ? row : row + 1 == shape[2] ? 0 : row + 1;
    }
  }
  return int64_t(sum);
}

}  // namespace fastres::cpu
