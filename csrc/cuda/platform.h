// What kernels need of CUDA beyond the language: shared memory, the grid's barrier, launches. Tests
// compile the same sources with g++, against an emulation of these.
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

// `name` is for error messages. A grid must not be empty.
template <class Args>
void launch(const char* name, void (*kernel)(Args), const LaunchShape& shape, void* stream,
            const Args& args) {
  const dim3 blocks(unsigned(shape.blocks)), threads(unsigned(shape.threads));
  const auto queue = static_cast<cudaStream_t>(stream);
  cudaGetLastError();  // somebody else's failure is not this launch's
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
