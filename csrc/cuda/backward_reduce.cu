// sum_g and sum_gx of every channel, for one or both branches of a block's end, in two launches.
#include "cuda/dispatch.h"
#include "cuda/gradient.h"

namespace fastres::cuda {
namespace {

struct Kernel {
  BackwardReduceArgs args;
  TileIteration iteration;
};

template <class T, int kPack, bool kPerColumn, bool kSecond, bool kOther>
__global__ void __launch_bounds__(kMostThreads) backward_reduce_kernel(Kernel k) {
  const auto place = Place<kPack, kPerColumn>::from_the_end(k.iteration);
  auto* scratch = &shared_memory<BlockSums<kPack, kPerColumn, kSecond>>();
  reduce_chunk<kOther ? 1 : 2, T, kPack, kPerColumn, kSecond, kOther>(k.args, place, scratch);
}

template <class T, bool kSecond>
__global__ void __launch_bounds__(kMostThreads, kSecond ? 2 : 3)
    backward_reduce_pipeline_kernel(Kernel k) {
  const auto place = Place<kVector, true>::from_the_end(k.iteration);
  reduce_chunk_in_pipeline<T, kSecond>(k.args, place, &shared_memory<unsigned char>());
}

template <int kSums>
__global__ void __launch_bounds__(kMergeThreads) merge_sums_kernel(Kernel k) {
  auto* scratch = &shared_memory<TotalSums<kSums>>();
  merge_sums<kSums>(k.args, MergeShare(blockIdx.x, k.iteration.chunks), k.iteration.channels,
                    scratch);
}

constexpr const char* kName = "bn_act_backward_reduce";

void reduce(const BackwardReduceArgs& args, bool vectors, const Where& where) {
  with_instance(args.shape, vectors, [&](auto type, auto pack, auto per_column) {
    using T = typename decltype(type)::type;
    constexpr int kPack = decltype(pack)::value;
    constexpr bool kPerColumn = decltype(per_column)::value;
    const Kernel k{args, tile_iteration(args.shape, args.tiling, kPack)};
    with_branches(args.gate, args.act, args.y[1], [&](auto second, auto other) {
      constexpr bool kSecond = decltype(second)::value;
      const size_t shared =
          sizeof(BlockSums<kPack, kPerColumn, kSecond>) * size_t(args.tiling.threads / 2);
      launch(kName, backward_reduce_kernel<T, kPack, kPerColumn, kSecond, decltype(other)::value>,
             launch_shape(k.iteration, args.tiling, shared), where.stream, k);
    });
  });
}

void reduce_in_pipeline(const BackwardReduceArgs& args, const Where& where) {
  const Kernel k{args, tile_iteration(args.shape, args.tiling, kVector)};
  with_pipeline(args.shape.dtype, args.y[1] != nullptr, args.gate,
                [&](auto type, auto second, size_t shared) {
                  using T = typename decltype(type)::type;
                  launch(kName, backward_reduce_pipeline_kernel<T, decltype(second)::value>,
                         launch_shape(k.iteration, args.tiling, shared), where.stream, k);
                });
}

void merge(const BackwardReduceArgs& args, const Where& where) {
  const Kernel k{args, tile_iteration(args.shape, args.tiling, 1)};
  with_bool(args.y[1] != nullptr, [&](auto second) {
    constexpr int kSums = decltype(second)::value ? 3 : 2;
    launch("merge_sums", merge_sums_kernel<kSums>,
           merge_shape(args.shape.c, sizeof(TotalSums<kSums>) * (kMergeThreads / 2)), where.stream,
           k);
  });
}

}  // namespace

void backward_reduce(const BackwardReduceArgs& args, const Where& where) {
  const DeviceGuard guard(where.device);
  check_gate(args.gate, args.act, args.y[1]);
  const void* out = args.gate == Gate::kOutput ? args.gate_ptr : nullptr;
  const bool vectors = vectorised(args.shape, {args.grad_out, args.y[0], args.y[1], out});
  takes_pipeline(args, vectors) ? reduce_in_pipeline(args, where) : reduce(args, vectors, where);
  merge(args, where);
}

}  // namespace fastres::cuda
