// Normalisation, residual and activation in one pass; the plain residual addition is the same
// without statistics.
#include "cuda/dispatch.h"
#include "cuda/normalise.h"

namespace fastres::cuda {
namespace {

struct Kernel {
  ScaleShiftActArgs args;
  TileIteration iteration;
};

// Left to itself (0), nvcc takes 64 registers for one of the others on sm_80, and spills.
template <class T, int kPack, bool kPerColumn, bool kScaled, bool kOther>
__global__ void __launch_bounds__(kMostThreads, kOther ? 2 : 0) scale_shift_act_kernel(Kernel k) {
  using Op = Normalise<T, kPack, kPerColumn, kScaled, kOther>;
  const Place<kPack, kPerColumn> place(k.iteration);
  for_each_item<kScaled ? 2 : 4>(Op(k.args, place), place);
}

}  // namespace

void scale_shift_act(const ScaleShiftActArgs& args, const Where& where) {
  const DeviceGuard guard(where.device);
  const bool vectors = vectorised(args.shape, {args.y, args.residual, args.out});
  with_instance(args.shape, vectors, [&](auto type, auto pack, auto per_column) {
    using T = typename decltype(type)::type;
    constexpr int kPack = decltype(pack)::value;
    constexpr bool kPerColumn = decltype(per_column)::value;
    const Kernel k{args, tile_iteration(args.shape, args.tiling, kPack)};
    with_end(args, [&](auto scaled, auto other) {
      constexpr bool kScaled = decltype(scaled)::value, kOther = decltype(other)::value;
      launch("scale_shift_act", scale_shift_act_kernel<T, kPack, kPerColumn, kScaled, kOther>,
             launch_shape(k.iteration, args.tiling), where.stream, k);
    });
  });
}

}  // namespace fastres::cuda
