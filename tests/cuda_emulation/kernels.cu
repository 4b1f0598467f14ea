// Small kernels that are right, and each with a fault that the emulation or a sanitizer must
// report. `kernels CASE [FAULT]` prints what a kernel leaves behind.
#include <cmath>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/platform.h"

namespace {

using fastres::cuda::commit_copies;
using fastres::cuda::copy_async;
using fastres::cuda::grid_barrier;
using fastres::cuda::launch;
using fastres::cuda::launch_cooperative;
using fastres::cuda::LaunchShape;
using fastres::cuda::shared_memory;
using fastres::cuda::wait_for_copies;

constexpr unsigned kAll = 0xffffffff;
constexpr int kThreads = 64;

std::string fault;
bool has(const char* name) { return fault == name; }

struct Sum {
  const float* in;
  float* out;
  bool no_barrier, early_exit, two_sites, overrun, read_first;
};

// out[block] = the sum of the block's 64 inputs.
__global__ void __launch_bounds__(kThreads) block_sum(Sum a) {
  float* scratch = shared_memory<float[kThreads]>();
  const int thread = int(threadIdx.x);
  const float before = scratch[thread];
  scratch[thread + (a.overrun ? 1 : 0)] = a.in[blockIdx.x * blockDim.x + thread];
  if (a.early_exit && thread == 5) {
    return;
  }
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (a.two_sites && thread == 3) {
      __syncthreads();  // the other
    } else if (!a.no_barrier) {
      __syncthreads();  // waited for
    }
    if (thread < half) {
      scratch[thread] += scratch[thread + half];
    }
  }
  if (thread == 0) {
    a.out[blockIdx.x] = a.read_first ? before : scratch[0];
  }
}

struct Vectors {
  const float* in;
  float* out;
  int count;
};

// Copies four values at a time.
__global__ void copy_vectors(Vectors a) {
  for (int i = int(threadIdx.x); i < a.count; i += int(blockDim.x)) {
    reinterpret_cast<float4*>(a.out)[i] = reinterpret_cast<const float4*>(a.in)[i];
  }
}

struct Lanes {
  double* out;
  bool lane_left, other_operation, wrong_mask, no_syncwarp;
};

// out: a sum by shuffles, votes, each kind of shuffle, and a neighbour's value by shared memory.
__global__ void warp_operations(Lanes a) {
  auto& scratch = shared_memory<int[32]>();
  const int lane = int(threadIdx.x);
  if (a.lane_left && lane == 7) {
    return;
  }
  if (a.other_operation && lane == 7) {
    __any_sync(kAll, 1);
  }
  double sum = lane;
  for (int delta = 16; delta > 0; delta /= 2) {
    sum += __shfl_down_sync(a.wrong_mask ? 0x7fffffff : kAll, sum, delta);
  }
  const unsigned odd = __ballot_sync(kAll, lane % 2);
  const int up = __shfl_up_sync(kAll, lane, 1);
  const unsigned segment = __shfl_sync(kAll, unsigned(lane), 3, 8);
  const float mirrored = __shfl_xor_sync(kAll, float(lane), 31);
  const int votes = __any_sync(kAll, lane == 9) + 2 * __all_sync(kAll, lane == 9) +
                    4 * __all_sync(kAll, lane >= 0) + 8 * __any_sync(kAll, lane < 0);
  scratch[lane] = lane;
  if (!a.no_syncwarp) {
    __syncwarp();
  }
  const int neighbour = scratch[(lane + 1) % 32];
  if (lane < 16) {  // half of the warp for itself
    sum += __shfl_sync(0xffff, 0.5, lane);
  }
  if (lane == 10) {
    const double results[] = {double(up), double(segment), mirrored, double(votes), double(odd)};
    std::copy(std::begin(results), std::end(results), a.out + 1);
  } else if (lane == 0) {
    a.out[0] = sum;
    a.out[6] = neighbour;
  }
}

struct Counts {
  int* all;
  float* sum;
  int* plain;
};

__global__ void count_atomically(Counts a) {
  atomicAdd(a.all, 1);
  atomicAdd(a.sum, 0.5f);
  if (a.plain) {
    *a.plain += int(threadIdx.x);
  }
}

struct Phases {
  int* partials;
  int* out;
  bool skip_second, no_barrier;
};

// Every block leaves a value, then every block sums up all of them.
__global__ void two_phases(Phases a) {
  if (threadIdx.x == 0) {
    a.partials[blockIdx.x] = int(blockIdx.x) + 1;
  }
  if (!a.no_barrier && !(a.skip_second && blockIdx.x == 1)) {
    grid_barrier();
  }
  if (threadIdx.x == 0) {
    a.out[blockIdx.x] = std::accumulate(a.partials, a.partials + gridDim.x, 0);
  }
}

struct Passage {
  const float4* in;
  float4* out;
  bool no_wait, no_commit, slot_in_use, misaligned;
};

// Copies a thread's four vectors by way of three slots: two are filled while one is read.
__global__ void __launch_bounds__(kThreads) copy_through_shared(Passage a) {
  constexpr int kVectors = 4, kSlots = 3;
  float4* slots = shared_memory<float4[kSlots * kThreads]>() + threadIdx.x;
  const int first = int(threadIdx.x) * kVectors;
  const auto fetch = [&](int i) {
    if (i < kVectors) {
      const float4* from = a.in + first + i;
      copy_async<16>(slots + i % kSlots * kThreads,
                     a.misaligned ? static_cast<const void*>(&from->y) : from);
    }
    if (!a.no_commit) {
      commit_copies();
    }
  };
  fetch(0);
  fetch(1);
  for (int i = 0; i < kVectors; ++i) {
    a.no_wait ? wait_for_copies<2>() : wait_for_copies<1>();
    fetch(i + (a.slot_in_use ? kSlots : 2));
    a.out[first + i] = slots[i % kSlots * kThreads];
  }
}

struct Nothing {};
__global__ void nothing(Nothing) {}

void print(const char* name, double value) { std::printf("%s %.10g\n", name, value); }

void sum_blocks() {
  const int blocks = 3;
  std::vector<float> in(blocks * kThreads - (has("global overrun") ? 1 : 0)), out(blocks, -1.0f);
  std::iota(in.begin(), in.end(), 0.0f);
  launch("block_sum", block_sum, {blocks, kThreads, kThreads * sizeof(float)}, nullptr,
         Sum{in.data(), out.data(), has("no barrier"), has("early exit"), has("two sites"),
             has("shared overrun"), has("uninitialised")});
  for (const float value : out) {
    print("sum", value);
  }
}

void copy() {
  alignas(16) float in[12], out[8] = {};
  std::iota(in, in + 12, 0.0f);
  launch("copy_vectors", copy_vectors, {1, kThreads, 0}, nullptr,
         Vectors{has("misaligned load") ? in + 1 : in, out, 2});
  print("last", out[7]);
}

void warp() {
  std::vector<double> out(7);
  launch("warp_operations", warp_operations, {1, has("half a warp") ? 16 : 32, 128}, nullptr,
         Lanes{out.data(), has("lane left"), has("other operation"), has("wrong mask"),
               has("no syncwarp")});
  for (const double value : out) {
    print("value", value);
  }
}

void atomics() {
  int all = 0, plain = 0;
  float sum = 0;
  launch("count_atomically", count_atomically, {3, kThreads, 0}, nullptr,
         Counts{&all, &sum, has("not atomic") ? &plain : nullptr});
  print("all", all);
  print("sum", sum);
}

void cooperate() {
  const int blocks = has("too many blocks") ? 5 : 3;
  std::vector<int> partials(blocks), out(blocks);
  const LaunchShape shape{blocks, kThreads, 0};
  const Phases args{partials.data(), out.data(), has("absent block"), has("no barrier")};
  has("ordinary launch") ? launch("two_phases", two_phases, shape, nullptr, args)
                         : launch_cooperative("two_phases", two_phases, shape, nullptr, args);
  for (const int value : out) {
    print("total", value);
  }
}

void pass_through() {
  std::vector<float4> in(4 * kThreads), out(4 * kThreads);
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = {float(i), 1, 2, 3};
  }
  launch("copy_through_shared", copy_through_shared, {1, kThreads, 3 * kThreads * 16}, nullptr,
         Passage{in.data(), out.data(), has("no wait"), has("no commit"), has("slot in use"),
                 has("misaligned copy")});
  int right = 0;
  for (size_t i = 0; i < in.size(); ++i) {
    right += in[i].x == out[i].x && out[i].y == 1 && out[i].z == 2 && out[i].w == 3;
  }
  print("copied", right);
}

void shapes() {
  LaunchShape shape{1, 32, 0};
  shape.blocks = has("no blocks") ? 0 : has("2^31 blocks") ? int64_t(1) << 31 : 1;
  shape.threads = has("no threads") ? 0 : has("1025 threads") ? 1025 : 32;
  shape.shared_bytes = has("100 KiB") ? 100 << 10 : 0;
  launch("nothing", nothing, shape, nullptr, {});
  print("launched", 1);
}

void small_shared() { launch("block_sum", block_sum, {1, kThreads, 128}, nullptr, Sum{}); }

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argv[1];
  fault = argc > 2 ? argv[2] : "";
  try {
    name == "sum"         ? sum_blocks()
    : name == "copy"      ? copy()
    : name == "warp"      ? warp()
    : name == "atomics"   ? atomics()
    : name == "cooperate" ? cooperate()
    : name == "pass"      ? pass_through()
    : name == "small"     ? small_shared()
                          : shapes();
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
}
