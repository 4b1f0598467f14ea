// grad_y of one or both branches, and the gated gradient itself, in one pass. The backward of a
// plain residual addition is the same without branches.
#include "cuda/dispatch.h"
#include "cuda/gradient.h"

namespace fastres::cuda {
namespace {

struct Kernel {
  BackwardApplyArgs args;
  Walk walk;
};

// Left to itself (0), nvcc takes 64 registers for one of these on sm_80, and spills another.
template <class T, int kPack, bool kPerColumn, bool kSecond>
constexpr int kBlocks = sizeof(T) == 2 && kPack == kVector && !kPerColumn && !kSecond ? 3 : 0;

template <class T, int kPack, bool kPerColumn, bool kSecond>
__global__ void __launch_bounds__(kMostThreads, kBlocks<T, kPack, kPerColumn, kSecond>)
    backward_apply_kernel(Kernel k) {
  using Op = ApplyGradients<T, kPack, kPerColumn, kSecond>;
  const Place<kPack, kPerColumn> place(k.walk);
  for_each_item<2>(Op(k.args, place), place);
}

}  // namespace

void backward_apply(const BackwardApplyArgs& args, const Where& where) {
  const DeviceGuard guard(where.device);
  check_gate(args.gate, args.grad_y[1]);
  const void* out = args.gate == Gate::kOutput ? args.gate_ptr : nullptr;
  const bool vectors = vectorised(args.shape, {args.grad_out, args.y[0], args.y[1], out,
                                               args.grad_y[0], args.grad_y[1], args.grad_residual});
  with_instance(args.shape, vectors, [&](auto type, auto pack, auto per_column) {
    using T = typename decltype(type)::type;
    constexpr int kPack = decltype(pack)::value;
    constexpr bool kPerColumn = decltype(per_column)::value;
    const Kernel k{args, make_walk(args.shape, args.tiling, kPack)};
    with_bool(args.grad_y[1] != nullptr, [&](auto second) {
      launch("bn_act_backward_apply",
             backward_apply_kernel<T, kPack, kPerColumn, decltype(second)::value>,
             launch_shape(k.walk, args.tiling), where.stream, k);
    });
  });
}

}  // namespace fastres::cuda
