// Mean and sum of squared deviations of channels: a thread's packs, a block's threads, all blocks.
#pragma once

#include "cuda/merge.h"
#include "cuda/pack.h"

namespace fastres::cuda {

// Statistics of `kSlots` channels over the same number of values each. What a thread sums up is
// relative to its first value, so float32 is wide enough there; what is joined is not, and where
// threads have few values each, the joins are most of the arithmetic. Only the division is in
// float32, being slow on many GPUs otherwise.
template <int kSlots>
struct Statistics {
  double mean[kSlots], m2[kSlots];
  float count;

  FASTRES_DEVICE void join(const Statistics& other) {
    if (other.count == 0) {
      return;
    }
    if (count == 0) {
      *this = other;
      return;
    }
    const double share = double(other.count / (count + other.count));
    const double weight = double(count) * share;
    FASTRES_UNROLLED
    for (int i = 0; i < kSlots; ++i) {
      const double delta = other.mean[i] - mean[i];
      mean[i] = fma(delta, share, mean[i]);
      m2[i] += fma(delta * delta, weight, other.m2[i]);
    }
    count += other.count;
  }
};

// What a thread knows of the values it has seen: how many, and sums of their differences d to a
// shift and of d^2, whence M2 = squares - sum^2 / count. The shift is the first value, and becomes
// the mean of all so far whenever there are kGrowth times as many as at the last time. So at least
// one in kGrowth of the values adds nothing to the sum; by Cauchy and Schwarz sum^2 / count is at
// most (1 - 1 / kGrowth) squares, and the difference loses that factor at most, whatever the
// values.
template <int kPack>
struct Running {
  static constexpr float kGrowth = 8, kFirstMove = 4;

  float shift[kPack] = {}, sum[kPack] = {}, squares[kPack] = {};
  float count = 0, next = 0;  // next: the count at which the shift changes

  // Of a group of packs those that exist.
  template <int kGroup, class T>
  FASTRES_DEVICE void add(const Raw<T, kPack> (&group)[kGroup], const bool (&exists)[kGroup]) {
    bool all = true, any = false, every[kGroup];
    FASTRES_UNROLLED
    for (int u = 0; u < kGroup; ++u) {
      all = all && exists[u];
      any = any || exists[u];
      every[u] = true;
    }
    if (!any) {
      return;
    }
    if (count >= next) {
      count == 0 ? start(group, exists) : move_shift();
    }
    all ? sum_up(group, every) : sum_up(group, exists);
  }

  FASTRES_DEVICE Statistics<kPack> statistics() const {
    Statistics<kPack> s;
    const double share = count > 0 ? 1.0 / double(count) : 0.0;
    FASTRES_UNROLLED
    for (int i = 0; i < kPack; ++i) {
      const double offset = double(sum[i]) * share;
      const double m2 = fma(-double(sum[i]), offset, double(squares[i]));
      s.mean[i] = double(shift[i]) + offset;
      s.m2[i] = m2 < 0 ? 0 : m2;  // squares may have vanished below the smallest float32
    }
    s.count = count;
    return s;
  }

 private:
  template <int kGroup, class T>
  FASTRES_DEVICE void start(const Raw<T, kPack> (&group)[kGroup], const bool (&exists)[kGroup]) {
    FASTRES_UNROLLED
    for (int u = kGroup - 1; u >= 0; --u) {
      if (exists[u]) {
        unpack(group[u], shift);
      }
    }
    next = kFirstMove;
  }

  // To the mean as float32 has it. What that is off by, exactly (Knuth's two-sum), remains the
  // mean of the differences.
  FASTRES_DEVICE void move_shift() {
    const float share = 1.0f / count;
    FASTRES_UNROLLED
    for (int i = 0; i < kPack; ++i) {
      const float offset = sum[i] * share, moved = shift[i] + offset;
      const float part = moved - shift[i];
      const float rest = (shift[i] - (moved - part)) + (offset - part);
      const float m2 = fmaf(-sum[i], offset, squares[i]);
      shift[i] = moved;
      sum[i] = count * rest;
      squares[i] = fmaf(sum[i], rest, m2);
    }
    next = count * kGrowth;
  }

  // The group by itself first: its terms are of one size, and the chain of sums is shorter.
  template <int kGroup, class T>
  FASTRES_DEVICE void sum_up(const Raw<T, kPack> (&group)[kGroup], const bool (&exists)[kGroup]) {
    float v[kGroup][kPack];
    FASTRES_UNROLLED
    for (int u = 0; u < kGroup; ++u) {
      unpack(group[u], v[u]);
      count += exists[u] ? 1.0f : 0.0f;
    }
    FASTRES_UNROLLED
    for (int i = 0; i < kPack; ++i) {
      float d[kGroup];
      FASTRES_UNROLLED
      for (int u = 0; u < kGroup; ++u) {
        d[u] = exists[u] ? v[u][i] - shift[i] : 0.0f;
      }
      float of_group = d[0], of_squares = d[0] * d[0];
      FASTRES_UNROLLED
      for (int u = 1; u < kGroup; ++u) {
        of_group += d[u];
        of_squares = fmaf(d[u], d[u], of_squares);
      }
      sum[i] += of_group;
      squares[i] += of_squares;
    }
  }
};

// Adds a thread's packs to its running statistics.
template <class T, int kPack, bool kPerColumn>
class AddStatistics {
 public:
  FASTRES_DEVICE AddStatistics(const void* y, Running<kPack>& running) : y_(y), running_(running) {}

  template <int kUnroll>
  FASTRES_DEVICE void apply(const Item (&items)[kUnroll], const Place<kPack, kPerColumn>&) const {
    Raw<T, kPack> raw[kUnroll];
    load_existing(y_, items, raw);
    bool exists[kUnroll];
    FASTRES_UNROLLED
    for (int u = 0; u < kUnroll; ++u) {
      exists[u] = items[u].exists;
    }
    running_.add(raw, exists);
  }

 private:
  const void* y_;
  Running<kPack>& running_;
};

template <int kPack, bool kPerColumn>
using BlockStatistics = Statistics<Place<kPack, kPerColumn>::kSlots>;

// Statistics of a chunk's rows into partials [chunks, 2, C]. `scratch` is for half of the threads.
template <int kUnroll, class T, int kPack, bool kPerColumn>
FASTRES_DEVICE void write_partial_statistics(const void* y, double* partials, int64_t channels,
                                             const Place<kPack, kPerColumn>& place,
                                             BlockStatistics<kPack, kPerColumn>* scratch) {
  constexpr int kSlots = Place<kPack, kPerColumn>::kSlots;
  Running<kPack> running;
  for_each_item<kUnroll>(AddStatistics<T, kPack, kPerColumn>(y, running), place, true);
  Statistics<kPack> all = running.statistics();
  Statistics<kSlots> mine;
  if constexpr (kPerColumn) {
    mine = all;
    join_lanes(mine, scratch, place.lanes(), int(blockDim.x) / place.lanes());
  } else {
    mine = {{0}, {0}, 0};
    FASTRES_UNROLLED
    for (int i = 0; i < kPack; ++i) {
      mine.join({{all.mean[i]}, {all.m2[i]}, all.count});
    }
    join_lanes(mine, scratch, int(blockDim.x), 1);
  }
  const bool writes = kPerColumn ? place.lane() == 0 && place.has_channels() : threadIdx.x == 0;
  if (writes) {
    double* partial = partials + place.chunk() * 2 * channels;
    FASTRES_UNROLLED
    for (int i = 0; i < kSlots; ++i) {
      partial[place.channel(i)] = mine.mean[i];
      partial[channels + place.channel(i)] = mine.m2[i];
    }
  }
}

// Fills a channel of stats [5, C].
FASTRES_DEVICE void write_stats(float* stats, int64_t channels, int64_t channel, double mean,
                                double var, const Affine& affine) {
  const double weight = affine.weight ? double(affine.weight[channel]) : 1.0;
  const double bias = affine.bias ? double(affine.bias[channel]) : 0.0;
  const ForwardCoefficients k = forward_coefficients(mean, var, weight, bias, affine.eps);
  stats += channel;
  stats[kMean * channels] = float(mean);
  stats[kVar * channels] = float(var);
  stats[kInvstd * channels] = float(k.invstd);
  stats[kScale * channels] = float(k.scale);
  stats[kShift * channels] = float(k.shift);
}

// Joins the partials of kMergeChannels channels, and writes what is known of them then.
FASTRES_DEVICE void merge_statistics(const ChannelStatsArgs& a, const TileIteration& iteration,
                                     const MergeShare& share, Statistics<1>* scratch) {
  const int64_t channels = iteration.channels;
  const bool exists = share.channel < channels;
  Statistics<1> mine{{0}, {0}, 0};
  if (exists) {
    FASTRES_UNROLLED_BY_4
    for (int64_t part = share.begin; part < share.end; ++part) {
      const double* p = a.partials + part * 2 * channels + share.channel;
      const int64_t rows_left = iteration.rows - part * iteration.chunk_rows;
      const int64_t rows = rows_left < iteration.chunk_rows ? rows_left : iteration.chunk_rows;
      mine.join({{p[0]}, {p[channels]}, float(rows * iteration.pixels)});
    }
  }
  join_lanes(mine, scratch, kMergeLanes, kMergeChannels);
  if (threadIdx.x >= kMergeChannels || !exists) {
    return;
  }
  Statistics<1> all = mine;
  if (a.prior) {
    const float* prior = a.prior + share.channel;
    all = {{double(prior[0])}, {double(prior[channels])}, float(a.prior_count)};
    all.join(mine);
  }
  const float mean = float(all.mean[0]), m2 = float(all.m2[0]);
  if (a.state) {
    a.state[share.channel] = mean;
    a.state[channels + share.channel] = m2;
  }
  if (a.stats) {
    const double count = double(iteration.rows * iteration.pixels + (a.prior ? a.prior_count : 0));
    write_stats(a.stats, channels, share.channel, double(mean), double(m2) / count, a.affine);
  }
}

}  // namespace fastres::cuda
