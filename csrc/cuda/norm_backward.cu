// The sums of batch norm's backward and grad_y, one block of channels after the other.
#include "cuda/channel_block.h"
#include "cuda/gradient.h"

namespace fastres::cuda {
namespace {

struct Kernel {
  NormBackwardArgs args;
  TileIteration iteration;
  int64_t channel_block;
};

template <bool kSecond>
using Scratch = BlockSums<kVector, true, kSecond>[kChannelBlockThreads / 2];

// Blocks per multiprocessor. Within the registers that two of them leave, nvcc spills one instance
// for compute capability 10.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T, bool kSecond>
constexpr int kBlocks = sizeof(T) == 4 && kSecond ? 1 : 2;
#else
template <class T, bool kSecond>
constexpr int kBlocks = 2;
#endif

template <class T, bool kSecond, bool kOther>
__global__ void __launch_bounds__(kChannelBlockThreads, (kBlocks<T, kSecond>))
    norm_backward_kernel(Kernel k) {
  using Op = ApplyGradients<T, kVector, true, kSecond, kOther>;
  using P = Place<kVector, true>;
  using Total = TotalSums<kSecond ? 3 : 2>;
  auto& scratch = shared_memory<Scratch<kSecond>>();
  run_channel_block(
      k.iteration, k.channel_block,
      [&](const P& place) {
        reduce_chunk<1, T, kVector, true, kSecond, kOther>(k.args.reduce, place, scratch);
      },
      [&](const MergeShare& share) {
        merge_sums(k.args.reduce, share, k.iteration.channels, reinterpret_cast<Total*>(scratch));
      },
      [&](const P& place) { for_each_item<1>(Op(k.args.apply, place), place); });
}

}  // namespace

void norm_backward(const NormBackwardArgs& args, const Where& where) {
  const DeviceGuard guard(where.device);
  const BackwardApplyArgs& a = args.apply;
  check_gate(a.gate, a.act, a.y[1]);
  const void* out = a.gate == Gate::kOutput ? a.gate_ptr : nullptr;
  const bool vectors = vectorised(
      a.shape, {a.grad_out, a.y[0], a.y[1], out, a.grad_y[0], a.grad_y[1], a.grad_residual});
  const Kernel k{args, channel_block_iteration(a.shape, a.tiling, vectors), 0};
  with_dtype(a.shape.dtype, [&](auto type) {
    with_branches(a.gate, a.act, a.y[1], [&](auto second, auto other) {
      using T = typename decltype(type)::type;
      constexpr bool kSecond = decltype(second)::value, kOther = decltype(other)::value;
      launch_channel_blocks("bn_act_backward", norm_backward_kernel<T, kSecond, kOther>, k,
                            sizeof(Scratch<kSecond>), where.stream);
    });
  });
}

int64_t norm_backward_blocks(DType dtype, bool second, const Where& where) {
  const DeviceGuard guard(where.device);
  int64_t blocks = 0;
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto resident = [](auto kernel, size_t shared) {
      return resident_blocks(kernel, kChannelBlockThreads, shared);
    };
    blocks = second
                 ? resident(norm_backward_kernel<T, true, false>, sizeof(Scratch<true>))
                 : std::min(resident(norm_backward_kernel<T, false, false>, sizeof(Scratch<false>)),
                            resident(norm_backward_kernel<T, false, true>, sizeof(Scratch<false>)));
  });
  return blocks;
}

}  // namespace fastres::cuda
