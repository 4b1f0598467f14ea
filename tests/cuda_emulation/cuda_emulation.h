// What kernels use of CUDA, for g++: the real sources run on a CPU, under sanitizers.
//
// A launch throws where a barrier or a warp's operation is not come to by everybody it waits for.
// AddressSanitizer and UBSan see shared memory of the size that the launch asks for, and CUDA's
// alignments. ThreadSanitizer sees every CUDA thread as one of its own, and no order between them
// but the one that CUDA promises: a missing barrier is a data race.
#pragma once

#include <algorithm>
#include <atomic>
#include <numeric>
#include <type_traits>

#include "fibers.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

inline constinit thread_local uint3 threadIdx, blockIdx;
inline constinit thread_local dim3 blockDim, gridDim;

namespace fastres::cuda {

namespace emulation {

using Site = std::source_location;

inline void barrier(const Arrival& arrival) {
  if (!current->wave->launch().omits(arrival.site)) {
    meet(arrival);
  }
}

// `value` and `source` as in Arrival.
inline uint64_t warp_meet(const char* operation, const Site& site, uint32_t mask, uint64_t value,
                          int source, bool orders_memory) {
  const CudaThread& self = *current;
  const auto require = [&](bool holds, const char* what) {
    if (!holds) {
      throw self.wave->launch().error(self.name() + " in " + operation + "() at " + place(site) +
                                      ": " + what);
    }
  };
  require(mask >> self.lane() & 1, "the mask must name the calling lane");
  require(source < 0 || (mask >> source & 1), "the mask must name the lane that is read");
  return meet({Scope::kWarp, operation, site, orders_memory, mask, value, source});
}

// The value that `lane` of the caller's segment of `width` lanes brings; the own one beyond the
// segment's ends. Shuffles and votes promise nothing about memory.
template <class T>
T shuffle(const char* operation, const Site& site, uint32_t mask, T value, int lane, int begin,
          int end) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const int source = lane >= begin && lane < end ? lane : current->lane();
  bits = warp_meet(operation, site, mask, bits, source, false);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int segment(int width) {
  if (width < 1 || width > kWarp || (width & (width - 1))) {
    throw current->wave->launch().error("width must be a power of two in 1..32, got " +
                                        std::to_string(width));
  }
  return current->lane() / width * width;
}

inline void enter(CudaThread& thread) {
  current = &thread;
  const LaunchShape& shape = thread.wave->launch().shape;
  threadIdx = {unsigned(thread.index), 0, 0};
  blockIdx = {unsigned(thread.block->index), 0, 0};
  blockDim = {unsigned(shape.threads)};
  gridDim = {unsigned(shape.blocks)};
}

// Blocks begin in a shuffled order, and as many are alive at a time as those of a cooperative
// launch may be.
inline void run_blocks(const Launch& launch, const Body& body) {
  launch.check();
  std::minstd_rand random(launch.seed + 1);
  std::vector<int64_t> blocks(launch.shape.blocks);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random);
  const int64_t at_once = launch.cooperative || kSeesRaces ? resident() : 1;
  for (int64_t begin = 0; begin < launch.shape.blocks; begin += at_once) {
    const int64_t end = std::min(launch.shape.blocks, begin + at_once);
    Wave wave(launch, {blocks.begin() + begin, blocks.begin() + end});
    run_wave(wave, enter, body, random);
    wave.rethrow();
  }
}

template <class Args>
void run(const Launch& launch, void (*kernel)(Args), const Args& args) {
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= kMostArguments);
  run_blocks(launch, [&] { kernel(args); });
}

}  // namespace emulation

template <class S>
S& shared_memory() {
  static_assert(alignof(S) <= 16);
  const emulation::Launch& launch = emulation::current->wave->launch();
  if (sizeof(S) > launch.shape.shared_bytes) {
    throw launch.error("shared_memory must fit into shared_bytes, got a type of " +
                       std::to_string(sizeof(S)));
  }
  return *reinterpret_cast<S*>(emulation::current->block->shared.get());
}

template <int kBytes>
void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 16);
  emulation::CudaThread& self = *emulation::current;
  for (const void* side : {static_cast<const void*>(shared), global}) {
    if (reinterpret_cast<uintptr_t>(side) % kBytes) {
      throw self.wave->launch().error(self.name() + " in copy_async(): both sides must begin at " +
                                      "multiples of " + std::to_string(kBytes));
    }
  }
  self.copies.begin(shared, global, kBytes);
}

inline void commit_copies() { emulation::current->copies.commit(); }

template <int kPending>
void wait_for_copies() {
  emulation::current->copies.wait(kPending);
}

inline void grid_barrier(emulation::Site site = emulation::Site::current()) {
  const emulation::Launch& launch = emulation::current->wave->launch();
  if (!launch.cooperative) {
    throw launch.error(emulation::current->name() + " calls grid_barrier() at " +
                       emulation::place(site) + ", but the launch is not cooperative");
  }
  emulation::barrier({emulation::Scope::kGrid, "grid_barrier", site});
}

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <class Args>
void launch(const char* name, void (*kernel)(Args), const LaunchShape& shape, void*,
            const Args& args) {
  emulation::run({name, shape, false}, kernel, args);
}

template <class Args>
void launch_cooperative(const char* name, void (*kernel)(Args), const LaunchShape& shape, void*,
                        Args args) {
  emulation::run({name, shape, true}, kernel, args);
}

template <class Args>
int64_t resident_blocks(void (*)(Args), int, size_t) {
  return emulation::resident();
}

}  // namespace fastres::cuda

inline void __syncthreads(std::source_location site = std::source_location::current()) {
  using namespace fastres::cuda::emulation;
  barrier({Scope::kBlock, "__syncthreads", site});
}

inline void __syncwarp(unsigned mask = 0xffffffff,
                       std::source_location site = std::source_location::current()) {
  using namespace fastres::cuda::emulation;
  if (!current->wave->launch().omits(site)) {
    warp_meet("__syncwarp", site, mask, 0, -1, true);
  }
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location site = std::source_location::current()) {
  using namespace fastres::cuda::emulation;
  return unsigned(warp_meet("__ballot_sync", site, mask, predicate != 0, -1, false));
}

inline int __any_sync(unsigned mask, int predicate,
                      std::source_location site = std::source_location::current()) {
  using namespace fastres::cuda::emulation;
  return warp_meet("__any_sync", site, mask, predicate != 0, -1, false) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      std::source_location site = std::source_location::current()) {
  using namespace fastres::cuda::emulation;
  return warp_meet("__all_sync", site, mask, predicate != 0, -1, false) == mask;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              std::source_location site = std::source_location::current()) {
  using namespace fastres::cuda::emulation;
  const int begin = segment(width);
  const int source = begin + (lane & (width - 1));
  return shuffle("__shfl_sync", site, mask, value, source, begin, begin + width);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 std::source_location site = std::source_location::current()) {
  using namespace fastres::cuda::emulation;
  const int begin = segment(width);
  const int source = current->lane() - int(delta);
  return shuffle("__shfl_up_sync", site, mask, value, source, begin, begin + width);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   std::source_location site = std::source_location::current()) {
  using namespace fastres::cuda::emulation;
  const int begin = segment(width);
  const int source = current->lane() + int(delta);
  return shuffle("__shfl_down_sync", site, mask, value, source, begin, begin + width);
}

// A segment may read those before it.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  std::source_location site = std::source_location::current()) {
  using namespace fastres::cuda::emulation;
  const int end = segment(width) + width;
  return shuffle("__shfl_xor_sync", site, mask, value, current->lane() ^ lanes, 0, end);
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
