// Packs of neighbouring elements: 8 by vector accesses of 16 bytes, or a single one.
#pragma once

#include "cuda/tile_iteration.h"
#include "fastres/dtype.h"

namespace fastres::cuda {

// A pack as it is stored. Loads are kept like this until they are used: it takes the fewest
// registers.
template <class T, int kPack>
struct Raw;
template <class T>
struct Raw<T, 1> {
  T value;
};
template <>
struct Raw<float, kVector> {
  float4 part[2];
};
template <>
struct Raw<BFloat16, kVector> {
  uint4 bits;
};
template <>
struct Raw<Float16, kVector> {
  uint4 bits;
};

template <int kPack, class T>
FASTRES_DEVICE Raw<T, kPack> load(const void* tensor, int64_t offset) {
  const T* p = static_cast<const T*>(tensor) + offset;
  if constexpr (kPack == 1) {
    return {*p};
  } else if constexpr (sizeof(T) == 4) {
    const float4* parts = reinterpret_cast<const float4*>(p);
    return {{parts[0], parts[1]}};
  } else {
    return {*reinterpret_cast<const uint4*>(p)};
  }
}

// 16 bytes in one access. Left to itself, nvcc makes four stores of a word each of some of these.
FASTRES_DEVICE void store_vector(uint4* p, const uint4& v) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#else
  *p = v;
#endif
}

template <int kPack, class T>
FASTRES_DEVICE void store(void* tensor, int64_t offset, const Raw<T, kPack>& raw) {
  T* p = static_cast<T*>(tensor) + offset;
  if constexpr (kPack == 1) {
    *p = raw.value;
  } else if constexpr (sizeof(T) == 4) {
    float4* parts = reinterpret_cast<float4*>(p);
    parts[0] = raw.part[0];
    parts[1] = raw.part[1];
  } else {
    store_vector(reinterpret_cast<uint4*>(p), raw.bits);
  }
}

// The packs that there are; the others keep what they hold.
template <class T, int kPack, int kUnroll>
FASTRES_DEVICE void load_existing(const void* tensor, const Item (&items)[kUnroll],
                                  Raw<T, kPack> (&raw)[kUnroll]) {
  FASTRES_UNROLLED
  for (int u = 0; u < kUnroll; ++u) {
    if (items[u].exists) {
      raw[u] = load<kPack, T>(tensor, items[u].offset);
    }
  }
}

// Two values rounded to nearest even, the first in the lower half: one instruction on a GPU.
template <class T>
FASTRES_DEVICE uint32_t pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
#else
  return FromAcc<T>::convert(low).bits | uint32_t(FromAcc<T>::convert(high).bits) << 16;
#endif
}

template <class T, int kPack>
FASTRES_DEVICE void unpack(const Raw<T, kPack>& raw, float (&v)[kPack]) {
  if constexpr (kPack == 1) {
    v[0] = to_acc(raw.value);
  } else if constexpr (sizeof(T) == 4) {
    FASTRES_UNROLLED
    for (int i = 0; i < 2; ++i) {
      v[4 * i] = raw.part[i].x;
      v[4 * i + 1] = raw.part[i].y;
      v[4 * i + 2] = raw.part[i].z;
      v[4 * i + 3] = raw.part[i].w;
    }
  } else {
    const uint32_t words[] = {raw.bits.x, raw.bits.y, raw.bits.z, raw.bits.w};
    FASTRES_UNROLLED
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = to_acc(T{uint16_t(words[i])});
      v[2 * i + 1] = to_acc(T{uint16_t(words[i] >> 16)});
    }
  }
}

template <class T, int kPack>
FASTRES_DEVICE Raw<T, kPack> packed(const float (&v)[kPack]) {
  if constexpr (kPack == 1) {
    return {FromAcc<T>::convert(v[0])};
  } else if constexpr (sizeof(T) == 4) {
    return {{make_float4(v[0], v[1], v[2], v[3]), make_float4(v[4], v[5], v[6], v[7])}};
  } else {
    return {make_uint4(pair<T>(v[0], v[1]), pair<T>(v[2], v[3]), pair<T>(v[4], v[5]),
                       pair<T>(v[6], v[7]))};
  }
}

// As it would be read back.
template <class T>
FASTRES_DEVICE float rounded(float v) {
  return to_acc(FromAcc<T>::convert(v));
}

// A value for each of a thread's channels; zero where there is no such channel.
template <class P>
FASTRES_DEVICE void per_channel(const float* values, const P& place, float (&v)[P::kSlots]) {
  FASTRES_UNROLLED
  for (int i = 0; i < P::kSlots; ++i) {
    v[i] = place.has_channels() ? values[place.channel(i)] : 0.0f;
  }
}

}  // namespace fastres::cuda
