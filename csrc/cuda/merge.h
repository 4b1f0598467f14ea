// Joining what threads, and then blocks, found about channels: always in the same order, so that
// two runs give the same bits.
#pragma once

#include "cuda/tile_iteration.h"

namespace fastres::cuda {

// Joins the values of the `lanes` threads that share a column (threadIdx.x % width): pairwise, the
// far half into the near one. Afterwards the threads of lane 0 have the result. `scratch` holds a
// value for half of the block's threads.
template <class Value>
FASTRES_DEVICE void join_lanes(Value& value, Value* scratch, int lanes, int width) {
  const int thread = int(threadIdx.x), lane = thread / width;
  for (int half = lanes / 2; half > 0; half /= 2) {
    if (lane >= half && lane < 2 * half) {
      scratch[thread - half * width] = value;
    }
    __syncthreads();
    if (lane < half) {
      value.join(scratch[thread]);
    }
    __syncthreads();
  }
}

// Partial results are joined by blocks of kMergeThreads: so many channels side by side, each in
// kMergeLanes parts of the sequence.
inline constexpr int kMergeThreads = 256;
inline constexpr int kMergeChannels = 8;
inline constexpr int kMergeLanes = kMergeThreads / kMergeChannels;

// What the calling thread joins: its channel, and its part of the sequence.
struct MergeShare {
  int64_t channel, begin, end;

  FASTRES_DEVICE MergeShare(int64_t group, int64_t parts) {
    const int64_t per_lane = (parts + kMergeLanes - 1) / kMergeLanes;
    const int64_t lane = int(threadIdx.x) / kMergeChannels;
    channel = group * kMergeChannels + int(threadIdx.x) % kMergeChannels;
    begin = lane * per_lane < parts ? lane * per_lane : parts;
    end = begin + per_lane < parts ? begin + per_lane : parts;
  }
};

inline LaunchShape merge_shape(int64_t channels, size_t shared_bytes) {
  return {ceil_div(channels, kMergeChannels), kMergeThreads, shared_bytes};
}

}  // namespace fastres::cuda
