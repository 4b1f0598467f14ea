// Batch statistics, normalisation, residual and activation, one block of channels after the other.
#include "cuda/channel_block.h"
#include "cuda/normalise.h"
#include "cuda/statistics.h"

namespace fastres::cuda {
namespace {

struct Kernel {
  NormForwardArgs args;
  TileIteration iteration;
  int64_t channel_block;
};

using Scratch = Statistics<kVector>[kChannelBlockThreads / 2];

template <class T, bool kScaled, bool kOther>
__global__ void __launch_bounds__(kChannelBlockThreads, 2) norm_forward_kernel(Kernel k) {
  using Op = Normalise<T, kVector, true, kScaled, kOther>;
  using P = Place<kVector, true>;
  auto& scratch = shared_memory<Scratch>();
  const NormForwardArgs& a = k.args;
  run_channel_block(
      k.iteration, k.channel_block,
      [&](const P& place) {
        write_partial_statistics<2, T>(a.statistics.y, a.statistics.partials, k.iteration.channels,
                                       place, scratch);
      },
      [&](const MergeShare& share) {
        merge_statistics(a.statistics, k.iteration, share,
                         reinterpret_cast<Statistics<1>*>(scratch));
      },
      [&](const P& place) { for_each_item<2>(Op(a.apply, place), place); });
}

}  // namespace

void norm_forward(const NormForwardArgs& args, const Where& where) {
  const DeviceGuard guard(where.device);
  const ScaleShiftActArgs& apply = args.apply;
  const bool vectors = vectorised(apply.shape, {apply.y, apply.residual, apply.out});
  const Kernel k{args, channel_block_iteration(apply.shape, apply.tiling, vectors), 0};
  with_dtype(apply.shape.dtype, [&](auto type) {
    with_end(apply, [&](auto scaled, auto other) {
      using T = typename decltype(type)::type;
      constexpr bool kScaled = decltype(scaled)::value, kOther = decltype(other)::value;
      launch_channel_blocks("bn_act_forward", norm_forward_kernel<T, kScaled, kOther>, k,
                            sizeof(Scratch), where.stream);
    });
  });
}

int64_t norm_forward_blocks(DType dtype, bool second, const Where& where) {
  const DeviceGuard guard(where.device);
  int64_t blocks = 0;
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_bool(second, [&](auto scaled) {
      const auto resident = [](auto kernel) {
        return resident_blocks(kernel, kChannelBlockThreads, sizeof(Scratch));
      };
      constexpr bool kScaled = decltype(scaled)::value;
      blocks = std::min(resident(norm_forward_kernel<T, kScaled, false>),
                        resident(norm_forward_kernel<T, kScaled, true>));
    });
  });
  return blocks;
}

}  // namespace fastres::cuda
