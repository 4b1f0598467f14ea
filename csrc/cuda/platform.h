// What kernels need of CUDA beyond the language: shared memory, copies into it, the grid's barrier,
// launches. Tests compile the same sources with g++, against an emulation of these.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastres::cuda {

struct LaunchShape {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
};

}  // namespace fastres::cuda

#if defined(FASTRES_CUDA_EMULATION)

#include "cuda_emulation.h"

#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace fastres::cuda {

// The first S of the block's dynamic shared memory.
template <class S>
__device__ __forceinline__ S& shared_memory() {
  extern __shared__ __align__(16) unsigned char fastres_shared[];
  return *reinterpret_cast<S*>(fastres_shared);
}

// Begins to copy 4 or 16 bytes, to which both sides are aligned. What the thread does meanwhile is
// not ordered with it.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = unsigned(__cvta_generic_to_shared(shared));
  const auto from = __cvta_generic_to_global(global);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes)
                 : "memory");
  }
}

// The copies that a thread has begun since the last call are a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Until a thread's groups have arrived, but for the last kPending ones.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Every thread of every block; only in kernels launched by `launch_cooperative`.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// Also takes back what the runtime remembers of a failure, or the next launch would report it.
inline void check(cudaError_t error, const char* what, const LaunchShape& shape) {
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(std::string(what) + " <<<" + std::to_string(shape.blocks) + ", " +
                             std::to_string(shape.threads) + ", " +
                             std::to_string(shape.shared_bytes) +
                             ">>> failed: " + cudaGetErrorString(error));
  }
}

// Makes a device the current one, for as long as this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice", {});
    if (before_ != device) {
      check(cudaSetDevice(device), "cudaSetDevice", {});
      switched_ = true;
    }
  }
  ~DeviceGuard() {
    if (switched_) {
      cudaSetDevice(before_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool switched_ = false;
};

// Shared memory that a block gets without being asked for; the more is a kernel's attribute.
inline constexpr size_t kSharedByDefault = 48 << 10;

// `name` is for error messages. A grid must not be empty.
template <class Args>
void launch(const char* name, void (*kernel)(Args), const LaunchShape& shape, void* stream,
            const Args& args) {
  const dim3 blocks(unsigned(shape.blocks)), threads(unsigned(shape.threads));
  const auto queue = static_cast<cudaStream_t>(stream);
  cudaGetLastError();  // somebody else's failure is not this launch's
  if (shape.shared_bytes > kSharedByDefault) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shape.shared_bytes)),
          name, shape);
  }
  // clang-format off
  kernel<<<blocks, threads, shape.shared_bytes, queue>>>(args);
  // clang-format on
  check(cudaGetLastError(), name, shape);
}

// As `launch`, of a kernel that uses `grid_barrier`: at most `resident_blocks` blocks.
template <class Args>
void launch_cooperative(const char* name, void (*kernel)(Args), const LaunchShape& shape,
                        void* stream, Args args) {
  void* pointers[] = {&args};
  check(
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                  dim3(unsigned(shape.blocks)), dim3(unsigned(shape.threads)),
                                  pointers, shape.shared_bytes, static_cast<cudaStream_t>(stream)),
      name, shape);
}

// How many blocks of a kernel the current device runs at the same time.
template <class Args>
int64_t resident_blocks(void (*kernel)(Args), int threads, size_t shared_bytes) {
  int device = 0, processors = 0, blocks = 0;
  const LaunchShape shape{0, threads, shared_bytes};
  check(cudaGetDevice(&device), "cudaGetDevice", shape);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute", shape);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor", shape);
  return int64_t(processors) * blocks;
}

}  // namespace fastres::cuda

#endif
