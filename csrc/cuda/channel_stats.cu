// Mean and sum of squared deviations of every channel, in two launches; and what follows from them.
#include "cuda/dispatch.h"
#include "cuda/statistics.h"

namespace fastres::cuda {
namespace {

struct Kernel {
  ChannelStatsArgs args;
  TileIteration iteration;
};

template <class T, int kPack, bool kPerColumn>
__global__ void __launch_bounds__(kMostThreads) channel_stats_kernel(Kernel k) {
  const auto place = Place<kPack, kPerColumn>::from_the_end(k.iteration);
  auto* scratch = &shared_memory<BlockStatistics<kPack, kPerColumn>>();
  write_partial_statistics<4, T>(k.args.y, k.args.partials, k.iteration.channels, place, scratch);
}

__global__ void __launch_bounds__(kMergeThreads) merge_stats_kernel(Kernel k) {
  auto* scratch = &shared_memory<Statistics<1>>();
  merge_statistics(k.args, k.iteration, MergeShare(blockIdx.x, k.iteration.chunks), scratch);
}

__global__ void __launch_bounds__(kMostThreads) finalize_stats_kernel(FinalizeStatsArgs a) {
  const int64_t channel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= a.channels) {
    return;
  }
  double mean = 0, var = 0;
  if (!a.state) {
    mean = double(a.running_mean[channel]);
    var = double(a.running_var[channel]);
  } else if (a.count > 0) {
    mean = double(a.state[channel]);
    var = double(a.state[a.channels + channel]) / double(a.count);
  }
  write_stats(a.stats, a.channels, channel, mean, var, a.affine);
}

}  // namespace

void channel_stats(const ChannelStatsArgs& args, const Where& where) {
  const DeviceGuard guard(where.device);
  with_instance(args.shape, vectorised(args.shape, {args.y}),
                [&](auto type, auto pack, auto per_column) {
                  using T = typename decltype(type)::type;
                  constexpr int kPack = decltype(pack)::value;
                  constexpr bool kPerColumn = decltype(per_column)::value;
                  const Kernel k{args, tile_iteration(args.shape, args.tiling, kPack)};
                  const size_t shared =
                      sizeof(BlockStatistics<kPack, kPerColumn>) * size_t(args.tiling.threads / 2);
                  launch("channel_stats", channel_stats_kernel<T, kPack, kPerColumn>,
                         launch_shape(k.iteration, args.tiling, shared), where.stream, k);
                  launch("merge_stats", merge_stats_kernel,
                         merge_shape(args.shape.c, sizeof(Statistics<1>) * (kMergeThreads / 2)),
                         where.stream, k);
                });
}

void finalize_stats(const FinalizeStatsArgs& args, const Where& where) {
  const DeviceGuard guard(where.device);
  launch("finalize_stats", finalize_stats_kernel,
         {ceil_div(args.channels, kMostThreads), kMostThreads, 0}, where.stream, args);
}

}  // namespace fastres::cuda
