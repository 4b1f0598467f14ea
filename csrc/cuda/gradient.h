// g = grad_out * act'(.), and what batch norm's backward makes of it: its sums, and grad_y.
#pragma once

#include "cuda/merge.h"
#include "cuda/pack.h"
#include "cuda/pipeline.h"

namespace fastres::cuda {

// What a gate reads beside grad_out and y.
template <class T, int kPack>
struct GateRaw {
  Raw<T, kPack> out;
  unsigned bits;
};

// The gate of a thread's channels. Which kind it is, is known at run time and the same for all
// threads: per pack it costs a few instructions, per kind it would cost an instance. Where two
// branches meet, no branch alone knows the gate: it is never affine there.
//
// kOther: the activation is neither none nor ReLU, and its derivative is computed from y. It would
// take everybody's registers, so it has instances of its own.
template <class T, int kPack, bool kPerColumn, bool kSecond, bool kOther>
class GateReader {
 public:
  using P = Place<kPack, kPerColumn>;

  // `scale` is filled where the gate reads y, and kept by the caller, who may use it as well.
  FASTRES_DEVICE GateReader(Gate kind, Activation act, const void* source, const float* stats,
                            const P& place, int64_t channels, float (&scale)[P::kSlots])
      : kind_(kind), act_(act), source_(source) {
    if (reads_y()) {
      per_channel(stats + kScale * channels, place, scale);
      per_channel(stats + kShift * channels, place, shift_);
    }
  }

  FASTRES_DEVICE bool reads_y() const { return kOther || (!kSecond && kind_ == Gate::kAffine); }

  template <int kUnroll>
  FASTRES_DEVICE void load(const Item (&items)[kUnroll], GateRaw<T, kPack> (&raw)[kUnroll],
                           const P& place) const {
    if constexpr (kOther) {
    } else if (kind_ == Gate::kMask) {
      const uint8_t* mask = static_cast<const uint8_t*>(source_);
      FASTRES_UNROLLED
      for (int u = 0; u < kUnroll; ++u) {
        if (items[u].exists) {
          raw[u].bits = unsigned(mask[items[u].mask]) >> (kPack == 1 ? place.mask_bit() : 0);
        }
      }
    } else if (kind_ == Gate::kOutput) {
      FASTRES_UNROLLED
      for (int u = 0; u < kUnroll; ++u) {
        if (items[u].exists) {
          raw[u].out = cuda::load<kPack, T>(source_, items[u].offset);
        }
      }
    }
  }

  // The same by way of a pipeline.
  template <int kTensors>
  FASTRES_DEVICE void fetch(const Item& item, const Slots<kTensors>& to) const {
    if (kind_ == Gate::kMask) {
      const uint8_t* mask = static_cast<const uint8_t*>(source_);
      copy_async<4>(to.template gate<uint32_t>(), mask + (item.mask & ~int64_t(3)));
    } else if (kind_ == Gate::kOutput) {
      const T* out = static_cast<const T*>(source_) + item.offset;
      copy_async<sizeof(uint4)>(to.template gate<uint4>(), out);
    }
  }
  template <int kTensors>
  FASTRES_DEVICE GateRaw<T, kPack> taken(const Slots<kTensors>& from, const P& place) const {
    GateRaw<T, kPack> raw;
    if (kind_ == Gate::kMask) {  // whose rows are whole words
      raw.bits = *from.template gate<uint32_t>() >> int(place.channel(0) & 24);
    } else if (kind_ == Gate::kOutput) {
      raw.out = {*from.template gate<uint4>()};
    }
    return raw;
  }

  // Zeroes the gradients that the activation does not let pass. Only a mask has bits: to pack what
  // the other kinds know costs as much as all the rest.
  FASTRES_DEVICE void apply(const GateRaw<T, kPack>& raw, const float (&y)[kPack],
                            const float (&scale)[P::kSlots], float (&g)[kPack]) const {
    if constexpr (kOther) {
      with_activation(act_, [&](auto act) {
        FASTRES_UNROLLED
        for (int i = 0; i < kPack; ++i) {
          const int slot = kPerColumn ? i : 0;
          const float v = fmaf(scale[slot], y[i], shift_[slot]);
          g[i] = backward<decltype(act)>(g[i], act.kGate ? rounded<T>(v) : v);
        }
      });
    } else if (kind_ == Gate::kMask) {
      FASTRES_UNROLLED
      for (int i = 0; i < kPack; ++i) {
        g[i] = raw.bits >> i & 1 ? g[i] : 0.0f;
      }
    } else if (kind_ == Gate::kOutput) {
      float out[kPack];
      unpack(raw.out, out);
      FASTRES_UNROLLED
      for (int i = 0; i < kPack; ++i) {
        g[i] = out[i] <= 0 ? 0.0f : g[i];
      }
    } else if (reads_y()) {
      FASTRES_UNROLLED
      for (int i = 0; i < kPack; ++i) {
        const int slot = kPerColumn ? i : 0;
        g[i] = relu_gate<T>(fmaf(scale[slot], y[i], shift_[slot])) ? g[i] : 0.0f;
      }
    }
  }

 private:
  Gate kind_;
  Activation act_;
  const void* source_;
  float shift_[P::kSlots];
};

// ---- reduce ----

// Sums over a thread's or a block's values of so many channels.
template <int kSums, int kSlots>
struct ChannelSums {
  float sum[kSums][kSlots];

  FASTRES_DEVICE void join(const ChannelSums& other) {
    FASTRES_UNROLLED
    for (int k = 0; k < kSums; ++k) {
      FASTRES_UNROLLED
      for (int i = 0; i < kSlots; ++i) {
        sum[k][i] += other.sum[k][i];
      }
    }
  }
};

// Adds g, and g * (y - mean) of each branch, to a thread's sums.
template <class T, int kPack, bool kPerColumn, bool kSecond, bool kOther = false>
class AddGradients {
 public:
  using P = Place<kPack, kPerColumn>;
  static constexpr int kSums = kSecond ? 3 : 2;
  using Sums = ChannelSums<kSums, kPack>;

  FASTRES_DEVICE AddGradients(const BackwardReduceArgs& args, const P& place, Sums& sums)
      : a_(args),
        gate_(args.gate, args.act, args.gate_ptr, args.stats[0], place, args.shape.c, scale_),
        sums_(sums) {
    FASTRES_UNROLLED
    for (int b = 0; b < kSums - 1; ++b) {
      per_channel(args.stats[b] + kMean * args.shape.c, place, mean_[b]);
    }
  }

  template <int kUnroll>
  FASTRES_DEVICE void apply(const Item (&items)[kUnroll], const P& place) const {
    Raw<T, kPack> grad[kUnroll], y[kSums - 1][kUnroll];
    GateRaw<T, kPack> gate[kUnroll];
    load_existing(a_.grad_out, items, grad);
    FASTRES_UNROLLED
    for (int b = 0; b < kSums - 1; ++b) {
      load_existing(a_.y[b], items, y[b]);
    }
    gate_.load(items, gate, place);
    FASTRES_UNROLLED
    for (int u = 0; u < kUnroll; ++u) {
      if (items[u].exists) {
        add(grad[u], gate[u], y[0][u], y[kSums - 2][u]);
      }
    }
  }

  // grad_out and what is normalised, of a pack in a pipeline.
  using OwnSlots = Slots<kSums>;
  FASTRES_DEVICE void fetch(const Item& item, const OwnSlots& to) const {
    to.template fetch<T>(0, a_.grad_out, item.offset);
    FASTRES_UNROLLED
    for (int b = 0; b < kSums - 1; ++b) {
      to.template fetch<T>(1 + b, a_.y[b], item.offset);
    }
    gate_.fetch(item, to);
  }
  FASTRES_DEVICE void take(const Item&, const OwnSlots& from, const P& place) const {
    add(from.template pack<T>(0), gate_.taken(from, place), from.template pack<T>(1),
        from.template pack<T>(kSums - 1));
  }

 private:
  FASTRES_DEVICE void add(const Raw<T, kPack>& grad, const GateRaw<T, kPack>& gate,
                          const Raw<T, kPack>& first, const Raw<T, kPack>& second) const {
    float g[kPack], y[kPack];
    unpack(grad, g);
    unpack(first, y);
    gate_.apply(gate, y, scale_, g);
    FASTRES_UNROLLED
    for (int i = 0; i < kPack; ++i) {
      sums_.sum[0][i] += g[i];
    }
    add_products(g, y, 1);
    if constexpr (kSecond) {
      unpack(second, y);
      add_products(g, y, 2);
    }
  }

  FASTRES_DEVICE void add_products(const float (&g)[kPack], const float (&y)[kPack], int k) const {
    FASTRES_UNROLLED
    for (int i = 0; i < kPack; ++i) {
      const float difference = y[i] - mean_[k - 1][kPerColumn ? i : 0];
      sums_.sum[k][i] = fmaf(g[i], difference, sums_.sum[k][i]);
    }
  }

  const BackwardReduceArgs& a_;
  float scale_[P::kSlots];
  GateReader<T, kPack, kPerColumn, kSecond, kOther> gate_;
  float mean_[kSums - 1][P::kSlots];
  Sums& sums_;
};

template <int kPack, bool kPerColumn, bool kSecond>
using BlockSums = ChannelSums<kSecond ? 3 : 2, Place<kPack, kPerColumn>::kSlots>;

// Sums of a chunk's rows into partials [chunks, kSums, C]. `scratch` is for half of the threads.
template <class T, int kPack, bool kPerColumn, bool kSecond>
FASTRES_DEVICE void write_partial_sums(const BackwardReduceArgs& args,
                                       const Place<kPack, kPerColumn>& place,
                                       const ChannelSums<kSecond ? 3 : 2, kPack>& all,
                                       BlockSums<kPack, kPerColumn, kSecond>* scratch) {
  constexpr int kSums = kSecond ? 3 : 2, kSlots = Place<kPack, kPerColumn>::kSlots;
  BlockSums<kPack, kPerColumn, kSecond> mine{};
  if constexpr (kPerColumn) {
    mine = all;
    join_lanes(mine, scratch, place.lanes(), int(blockDim.x) / place.lanes());
  } else {
    FASTRES_UNROLLED
    for (int i = 0; i < kSums * kPack; ++i) {
      mine.sum[i / kPack][0] += all.sum[i / kPack][i % kPack];
    }
    join_lanes(mine, scratch, int(blockDim.x), 1);
  }
  const bool writes = kPerColumn ? place.lane() == 0 && place.has_channels() : threadIdx.x == 0;
  if (writes) {
    float* partial = args.partials + place.chunk() * kSums * args.shape.c;
    FASTRES_UNROLLED
    for (int i = 0; i < kSums * kSlots; ++i) {
      partial[i / kSlots * args.shape.c + place.channel(i % kSlots)] =
          mine.sum[i / kSlots][i % kSlots];
    }
  }
}

template <int kUnroll, class T, int kPack, bool kPerColumn, bool kSecond, bool kOther = false>
FASTRES_DEVICE void reduce_chunk(const BackwardReduceArgs& args,
                                 const Place<kPack, kPerColumn>& place,
                                 BlockSums<kPack, kPerColumn, kSecond>* scratch) {
  using Op = AddGradients<T, kPack, kPerColumn, kSecond, kOther>;
  typename Op::Sums all{};
  for_each_item<kUnroll>(Op(args, place, all), place, true);
  write_partial_sums<T, kPack, kPerColumn, kSecond>(args, place, all, scratch);
}

// The same sums, bit for bit, by way of a pipeline. `shared` is for the pipeline, and then for
// `scratch`.
template <class T, bool kSecond>
FASTRES_DEVICE void reduce_chunk_in_pipeline(const BackwardReduceArgs& args,
                                             const Place<kVector, true>& place,
                                             unsigned char* shared) {
  using Op = AddGradients<T, kVector, true, kSecond>;
  typename Op::Sums all{};
  for_each_item_in_pipeline<Op::kSums>(Op(args, place, all), place, shared, true);
  __syncthreads();
  static_assert(sizeof(BlockSums<kVector, true, kSecond>) * kMostThreads / 2 <=
                kVectorBytes<Op::kSums>);
  auto* scratch = reinterpret_cast<BlockSums<kVector, true, kSecond>*>(shared);
  write_partial_sums<T, kVector, true, kSecond>(args, place, all, scratch);
}

// The sums of one channel over all chunks, in float64: there are few of them.
template <int kSums>
struct TotalSums {
  double sum[kSums];

  FASTRES_DEVICE void join(const TotalSums& other) {
    FASTRES_UNROLLED
    for (int k = 0; k < kSums; ++k) {
      sum[k] += other.sum[k];
    }
  }
};

// Joins the partials of kMergeChannels channels that end at `end`, and writes their sums.
template <int kSums>
FASTRES_DEVICE void merge_sums(const BackwardReduceArgs& a, const MergeShare& share, int64_t end,
                               TotalSums<kSums>* scratch) {
  const int64_t channels = a.shape.c;
  TotalSums<kSums> mine{};
  if (share.channel < end) {
    FASTRES_UNROLLED_BY_4
    for (int64_t part = share.begin; part < share.end; ++part) {
      const float* p = a.partials + part * kSums * channels + share.channel;
      FASTRES_UNROLLED
      for (int k = 0; k < kSums; ++k) {
        mine.sum[k] += double(p[k * channels]);
      }
    }
  }
  join_lanes(mine, scratch, kMergeLanes, kMergeChannels);
  if (threadIdx.x < kMergeChannels && share.channel < end) {
    FASTRES_UNROLLED
    for (int k = 0; k < kSums; ++k) {
      const int64_t at = k * channels + share.channel;
      const double scale = k ? double(a.stats[k - 1][kInvstd * channels + share.channel]) : 1.0;
      const double prior = a.prior ? double(a.prior[at]) : 0.0;
      a.sums[at] = float(prior + scale * mine.sum[k]);
    }
  }
}

// ---- apply ----

// grad_y = a * (g - mean_g) + b * (y - mean), mean_g = sum_g / count. Written like this nothing
// cancels where the mean is large, and mean_g serves both branches.
template <class P>
struct Coefficients {
  float a[P::kSlots], b[P::kSlots], mean[P::kSlots];

  // `sum_gx` null: running statistics, where b = 0.
  FASTRES_DEVICE void load(const float* stats, const float* sum_gx, float count, int64_t channels,
                           const P& place) {
    per_channel(stats + kScale * channels, place, a);
    if (!sum_gx) {
      return;
    }
    float invstd[P::kSlots], sum[P::kSlots];
    per_channel(stats + kMean * channels, place, mean);
    per_channel(stats + kInvstd * channels, place, invstd);
    per_channel(sum_gx, place, sum);
    FASTRES_UNROLLED
    for (int i = 0; i < P::kSlots; ++i) {
      b[i] = -(a[i] * invstd[i]) * (sum[i] / count);
    }
  }
};

// Writes grad_y of one or both branches, and g itself.
template <class T, int kPack, bool kPerColumn, bool kSecond, bool kOther = false>
class ApplyGradients {
 public:
  using P = Place<kPack, kPerColumn>;

  FASTRES_DEVICE ApplyGradients(const BackwardApplyArgs& args, const P& place)
      : a_(args),
        gate_(args.gate, args.act, args.gate_ptr, args.stats[0], place, args.shape.c, first_.a) {
    const float count = float(args.count);
    const int64_t c = args.shape.c;
    const float* sums = args.sums;
    if (sums) {
      per_channel(sums + kSumG * c, place, mean_g_);
      FASTRES_UNROLLED
      for (int i = 0; i < P::kSlots; ++i) {
        mean_g_[i] /= count;
      }
    }
    if (args.grad_y[0]) {
      first_.load(args.stats[0], sums ? sums + kSumGX1 * c : nullptr, count, c, place);
    }
    if constexpr (kSecond) {
      second_.load(args.stats[1], sums ? sums + kSumGX2 * c : nullptr, count, c, place);
    }
  }

  template <int kUnroll>
  FASTRES_DEVICE void apply(const Item (&items)[kUnroll], const P& place) const {
    Raw<T, kPack> grad[kUnroll], first[kUnroll], second[kUnroll];
    GateRaw<T, kPack> gate[kUnroll];
    load_existing(a_.grad_out, items, grad);
    if (reads_first()) {
      load_existing(a_.y[0], items, first);
    }
    if (kSecond && a_.sums) {
      load_existing(a_.y[1], items, second);
    }
    gate_.load(items, gate, place);
    FASTRES_UNROLLED
    for (int u = 0; u < kUnroll; ++u) {
      if (items[u].exists) {
        write(items[u].offset, grad[u], gate[u], first[u], second[u]);
      }
    }
  }

  // grad_out and what is normalised, of a pack in a pipeline.
  static constexpr int kTensors = kSecond ? 3 : 2;
  FASTRES_DEVICE void fetch(const Item& item, const Slots<kTensors>& to) const {
    to.template fetch<T>(0, a_.grad_out, item.offset);
    if (reads_first()) {
      to.template fetch<T>(1, a_.y[0], item.offset);
    }
    if (kSecond && a_.sums) {
      to.template fetch<T>(kTensors - 1, a_.y[1], item.offset);
    }
    gate_.fetch(item, to);
  }
  FASTRES_DEVICE void take(const Item& item, const Slots<kTensors>& from, const P& place) const {
    write(item.offset, from.template pack<T>(0), gate_.taken(from, place), from.template pack<T>(1),
          from.template pack<T>(kTensors - 1));
  }

 private:
  FASTRES_DEVICE bool reads_first() const { return gate_.reads_y() || (a_.sums && a_.grad_y[0]); }

  FASTRES_DEVICE void write(int64_t offset, const Raw<T, kPack>& grad,
                            const GateRaw<T, kPack>& gate, const Raw<T, kPack>& first,
                            const Raw<T, kPack>& second) const {
    float g[kPack], y[kPack];
    unpack(grad, g);
    unpack(first, y);
    gate_.apply(gate, y, first_.a, g);
    if (a_.grad_residual) {
      store<kPack, T>(a_.grad_residual, offset, packed<T>(g));
    }
    if (a_.grad_y[0]) {
      write_branch(a_.grad_y[0], offset, g, y, first_);
    }
    if constexpr (kSecond) {
      unpack(second, y);
      write_branch(a_.grad_y[1], offset, g, y, second_);
    }
  }

  FASTRES_DEVICE void write_branch(void* grad_y, int64_t offset, const float (&g)[kPack],
                                   const float (&y)[kPack], const Coefficients<P>& k) const {
    float v[kPack];
    FASTRES_UNROLLED
    for (int i = 0; i < kPack; ++i) {
      const int slot = kPerColumn ? i : 0;
      if (a_.sums) {
        v[i] = fmaf(k.a[slot], g[i] - mean_g_[slot], k.b[slot] * (y[i] - k.mean[slot]));
      } else {  // running statistics: y was not read
        v[i] = k.a[slot] * g[i];
      }
    }
    store<kPack, T>(grad_y, offset, packed<T>(v));
  }

  const BackwardApplyArgs& a_;
  float mean_g_[P::kSlots];
  Coefficients<P> first_, second_;
  GateReader<T, kPack, kPerColumn, kSecond, kOther> gate_;
};

// ---- host ----

inline void check_gate(Gate gate, Activation act, const void* second) {
  if (is_other(act) && (gate == Gate::kOutput || (gate == Gate::kMask && !is_gate(act)))) {
    throw std::invalid_argument("gate must be none or affine for this activation");
  }
  if (gate == Gate::kAffine && second) {
    throw std::invalid_argument("gate must be none, mask or out where there are two branches");
  }
}

// Calls f(kSecond, kOther) with the two as constants.
template <class F>
void with_branches(Gate gate, Activation act, const void* second, const F& f) {
  if (gate == Gate::kAffine && is_other(act)) {
    return f(Constant<false>{}, Constant<true>{});
  }
  with_bool(second != nullptr, [&](auto both) { f(both, Constant<false>{}); });
}

}  // namespace fastres::cuda
