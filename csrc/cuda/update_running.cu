// Running statistics of a block's batch norms, in one launch.
#include "cuda/dispatch.h"

namespace fastres::cuda {
namespace {

struct Kernel {
  RunningUpdate updates[kMostUpdates];
  int count;
};

FASTRES_DEVICE double batch_of(const RunningUpdate& u, StatsRow row, int64_t channel) {
  return u.stats_dtype == DType::kFloat64 ? batch_value<double>(u, row, channel)
                                          : batch_value<float>(u, row, channel);
}

FASTRES_DEVICE void blend(const RunningUpdate& u, StatsRow row, const RunningVector& running,
                          int64_t channel, double factor) {
  if (!running.data) {
    return;
  }
  const double batch = batch_of(u, row, channel);
  switch (running.dtype) {
    case DType::kFloat32:
      return blend_into<float>(running, channel, batch, factor);
    case DType::kBFloat16:
      return blend_into<BFloat16>(running, channel, batch, factor);
    case DType::kFloat16:
      return blend_into<Float16>(running, channel, batch, factor);
    case DType::kFloat64:
      return blend_into<double>(running, channel, batch, factor);
  }
}

// Whether the factor is known only to those who have read the counter.
FASTRES_HD bool counts(const RunningUpdate& u) { return u.cumulative && u.counter; }

// A thread has the same channels in every update: a norm that is there twice takes in both batches
// in their order. The counter belongs to the first thread; where others need it the grid is one
// block, and they read it between two barriers.
__global__ void __launch_bounds__(kMostThreads) update_running_kernel(Kernel k) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  FASTRES_NOT_UNROLLED
  for (int i = 0; i < k.count; ++i) {
    const RunningUpdate& u = k.updates[i];
    if (u.counter && first == 0) {
      *u.counter += 1;
    }
    double factor = u.cumulative ? 0.0 : u.momentum;
    if (counts(u)) {
      __syncthreads();
      factor = 1.0 / double(*u.counter);
      __syncthreads();
    }
    FASTRES_NOT_UNROLLED
    for (int64_t channel = first; channel < u.channels; channel += step) {
      blend(u, kMean, u.mean, channel, factor);
      blend(u, kVar, u.var, channel, factor);
    }
  }
}

}  // namespace

void update_running(const RunningUpdate* updates, int64_t count, const Where& where) {
  const DeviceGuard guard(where.device);
  for (int64_t begin = 0; begin < count; begin += kMostUpdates) {
    Kernel k{};
    k.count = int(std::min<int64_t>(kMostUpdates, count - begin));
    int64_t channels = 1;
    bool one_block = false;
    for (int i = 0; i < k.count; ++i) {
      k.updates[i] = updates[begin + i];
      channels = std::max(channels, k.updates[i].channels);
      one_block = one_block || counts(k.updates[i]);
    }
    const int64_t blocks = one_block ? 1 : ceil_div(channels, kMostThreads);
    launch("update_running", update_running_kernel, {blocks, kMostThreads, 0}, where.stream, k);
  }
}

}  // namespace fastres::cuda
