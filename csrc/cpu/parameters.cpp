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
          to[write + l * a.to_strides[3]] = To(from[read + l * a.from_strides[3]]);
        }
      }
    }
  }
}

template <class From>
void copy_from(const CopyArgs& a) {
  a.to_dtype == DType::kFloat64 ? copy_as<From, double>(a) : copy_as<From, float>(a);
}

}  // namespace

void copy(const CopyArgs& a) {
  a.from_dtype == DType::kFloat64 ? copy_from<double>(a) : copy_from<float>(a);
}

int64_t sample_weight(const float* weight, const int64_t* shape, const int64_t* strides) {
  const int64_t places = shape[1] * shape[2] * shape[3];
  uint64_t sum = 14695981039346656037u;  // FNV-1a
  for (int64_t k = 0; k < shape[0] && places > 0; ++k) {
    const int64_t place = k % places, tap = place / shape[1];
    const int64_t offset = k * strides[0] + place % shape[1] * strides[1] +
                           tap / shape[3] * strides[2] + tap % shape[3] * strides[3];
    uint32_t bits;
    memcpy(&bits, weight + offset, sizeof(bits));
    sum = (sum ^ bits) * 1099511628211u;
  }
  return int64_t(sum);
}

}  // namespace fastres::cpu
