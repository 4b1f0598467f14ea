// grad_y of one or both branches, and the gated gradient itself, in one pass. The backward of a
// plain residual addition is the same without branches.
#include "cuda/dispatch.h"
#include "cuda/gradient.h"

namespace fastres::cuda {
namespace {

struct Kernel {
  BackwardApplyArgs args;
  TileIteration iteration;
};

// Left to itself (0), nvcc takes 64 registers for one of these on sm_80, and spills another.
template <class T, int kPack, bool kPerColumn, bool kSecond>
constexpr int kBlocks = sizeof(T) == 2 && kPack == kVector && !kPerColumn && !kSecond ? 3 : 0;

template <class T, int kPack, bool kPerColumn, bool kSecond, bool kOther>
__global__ void __launch_bounds__(kMostThreads, kBlocks<T, kPack, kPerColumn, kSecond>)
    backward_apply_kernel(Kernel k) {
  using Op = ApplyGradients<T, kPack, kPerColumn, kSecond, kOther>;
  const Place<kPack, kPerColumn> place(k.iteration);
  for_each_item<2>(Op(k.args, place), place);
}

template <class T, bool kSecond>
__global__ void __launch_bounds__(kMostThreads, kSecond ? 2 : 3)
    backward_apply_pipeline_kernel(Kernel k) {
  using Op = ApplyGradients<T, kVector, true, kSecond>;
  const Place<kVector, true> place(k.iteration);
  for_each_item_in_pipeline<Op::kTensors>(Op(k.args, place), place,
                                          &shared_memory<unsigned char>());
}

constexpr const char* kName = "bn_act_backward_apply";

void apply(const BackwardApplyArgs& args, bool vectors, const Where& where) {
  with_instance(args.shape, vectors, [&](auto type, auto pack, auto per_column) {
    using T = typename decltype(type)::type;
    constexpr int kPack = decltype(pack)::value;
    constexpr bool kPerColumn = decltype(per_column)::value;
    const Kernel k{args, tile_iteration(args.shape, args.tiling, kPack)};
    with_branches(args.gate, args.act, args.grad_y[1], [&](auto second, auto other) {
      constexpr bool kSecond = decltype(second)::value, kOther = decltype(other)::value;
      launch(kName, backward_apply_kernel<T, kPack, kPerColumn, kSecond, kOther>,
             launch_shape(k.iteration, args.tiling), where.stream, k);
    });
  });
}

void apply_in_pipeline(const BackwardApplyArgs& args, const Where& where) {
  const Kernel k{args, tile_iteration(args.shape, args.tiling, kVector)};
  with_pipeline(args.shape.dtype, args.grad_y[1] != nullptr, args.gate,
                [&](auto type, auto second, size_t shared) {
                  using T = typename decltype(type)::type;
                  launch(kName, backward_apply_pipeline_kernel<T, decltype(second)::value>,
                         launch_shape(k.iteration, args.tiling, shared), where.stream, k);
                });
}

}  // namespace

void backward_apply(const BackwardApplyArgs& args, const Where& where) {
  const DeviceGuard guard(where.device);
  check_gate(args.gate, args.act, args.grad_y[1]);
  const void* out = args.gate == Gate::kOutput ? args.gate_ptr : nullptr;
  const bool vectors = vectorised(args.shape, {args.grad_out, args.y[0], args.y[1], out,
                                               args.grad_y[0], args.grad_y[1], args.grad_residual});
  takes_pipeline(args, vectors) ? apply_in_pipeline(args, where) : apply(args, vectors, where);
}

}  // namespace fastres::cuda
