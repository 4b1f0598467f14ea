// act(scale * y + shift [+ residual | + residual_scale * residual + residual_shift]), pack by pack.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/pack.h"

namespace fastres::cuda {

// Writes a mask's byte: a vector is one, and so are 8 neighbouring threads of one element each. All
// threads of a warp have to come here.
template <int kPack, class P>
FASTRES_DEVICE void store_bits(uint8_t* mask, const Item& item, unsigned bits, const P& place) {
  if constexpr (kPack == 1) {
    const unsigned votes = __ballot_sync(0xffffffffu, item.exists && bits != 0);
    if (item.exists && place.mask_bit() == 0) {
      mask[item.mask] = uint8_t(votes >> (threadIdx.x & 24u));
    }
  } else if (item.exists) {
    mask[item.mask] = uint8_t(bits);
  }
}

// kScaled: the residual has a scale and a shift of its own. kOther: the activation is neither none
// nor ReLU, whose instances it leaves as they are.
template <class T, int kPack, bool kPerColumn, bool kScaled, bool kOther>
class Normalise {
 public:
  using P = Place<kPack, kPerColumn>;

  FASTRES_DEVICE Normalise(const ScaleShiftActArgs& args, const P& place) : a_(args) {
    const int64_t c = a_.shape.c;
    if (a_.stats) {
      per_channel(a_.stats + kScale * c, place, scale_);
      per_channel(a_.stats + kShift * c, place, shift_);
    }
    if constexpr (kScaled) {
      per_channel(a_.residual_stats + kScale * c, place, residual_scale_);
      per_channel(a_.residual_stats + kShift * c, place, residual_shift_);
    }
  }

  template <int kUnroll>
  FASTRES_DEVICE void apply(const Item (&items)[kUnroll], const P& place) const {
    Raw<T, kPack> y[kUnroll], residual[kUnroll];
    load_existing(a_.y, items, y);
    if (a_.residual) {
      load_existing(a_.residual, items, residual);
    }
    FASTRES_UNROLLED
    for (int u = 0; u < kUnroll; ++u) {
      float v[kPack];
      unpack(y[u], v);
      affine(v);
      if (a_.residual) {
        add(residual[u], v);
      }
      const unsigned bits = a_.mask ? gate_bits(v) : 0;
      activate(v);
      if (items[u].exists) {
        store<kPack, T>(a_.out, items[u].offset, packed<T>(v));
      }
      if (a_.mask) {
        store_bits<kPack>(a_.mask, items[u], bits, place);
      }
    }
  }

 private:
  FASTRES_DEVICE static constexpr int slot(int i) { return kPerColumn ? i : 0; }

  FASTRES_DEVICE void affine(float (&v)[kPack]) const {
    if (!a_.stats) {
      return;
    }
    FASTRES_UNROLLED
    for (int i = 0; i < kPack; ++i) {
      v[i] = fmaf(scale_[slot(i)], v[i], shift_[slot(i)]);
    }
  }

  FASTRES_DEVICE void add(const Raw<T, kPack>& residual, float (&v)[kPack]) const {
    float r[kPack];
    unpack(residual, r);
    FASTRES_UNROLLED
    for (int i = 0; i < kPack; ++i) {
      if constexpr (kScaled) {
        r[i] = fmaf(residual_scale_[slot(i)], r[i], residual_shift_[slot(i)]);
      }
      v[i] += r[i];
    }
  }

  FASTRES_DEVICE void activate(float (&v)[kPack]) const {
    if constexpr (kOther) {
      with_activation(a_.act, [&](auto act) {
        FASTRES_UNROLLED
        for (int i = 0; i < kPack; ++i) {
          v[i] = act.value(v[i]);
        }
      });
    } else if (a_.act == Activation::kRelu) {
      FASTRES_UNROLLED
      for (int i = 0; i < kPack; ++i) {
        v[i] = relu(v[i]);
      }
    }
  }

  // The derivative's bits, before the activation. Only a mask asks for them: they cost as much as
  // all the rest.
  FASTRES_DEVICE unsigned gate_bits(const float (&v)[kPack]) const {
    if (!kOther && a_.act != Activation::kRelu) {
      return (1u << kPack) - 1;
    }
    unsigned bits = 0;
    FASTRES_UNROLLED
    for (int i = 0; i < kPack; ++i) {
      bits |= unsigned(kOther ? Relu6::open(rounded<T>(v[i])) : relu_gate<T>(v[i])) << i;
    }
    return bits;
  }

  const ScaleShiftActArgs& a_;
  float scale_[P::kSlots], shift_[P::kSlots];
  float residual_scale_[P::kSlots], residual_shift_[P::kSlots];
};

// ---- host ----

// Calls f(kScaled, kOther) with the two as constants.
template <class F>
void with_end(const ScaleShiftActArgs& args, const F& f) {
  if (args.mask && !is_gate(args.act)) {
    throw std::invalid_argument("act must be none or a gate where a mask is wanted");
  }
  with_bool(args.residual_stats != nullptr, [&](auto scaled) {
    with_bool(is_other(args.act), [&](auto other) { f(scaled, other); });
  });
}

}  // namespace fastres::cuda
