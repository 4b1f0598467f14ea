// Packs on their way to a thread, in a pipeline of slots in shared memory: the copies of the next
// ones are under way while it computes, and take no registers. A thread fills and reads its own
// slots alone, so nobody waits for anybody else.
//
// For vectors of 16-bit storage under channels_last.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/pack.h"

namespace fastres::cuda {

// What comes first in a pipeline: the vectors of so many tensors.
template <int kTensors>
inline constexpr size_t kVectorBytes = sizeof(uint4) * kPipelineStages * kMostThreads * kTensors;

// What a stage of the pipeline holds for the calling thread: vectors of so many tensors, and what
// the gate reads.
template <int kTensors>
class Slots {
 public:
  FASTRES_DEVICE Slots(unsigned char* pipeline, unsigned stage)
      : pipeline_(pipeline), stage_(stage) {}

  template <class T>
  FASTRES_DEVICE void fetch(int i, const void* tensor, int64_t offset) const {
    copy_async<sizeof(uint4)>(vector(i), static_cast<const T*>(tensor) + offset);
  }
  template <class T>
  FASTRES_DEVICE Raw<T, kVector> pack(int i) const {
    return {*vector(i)};
  }

  template <class V>
  FASTRES_DEVICE V* gate() const {
    V* slots = reinterpret_cast<V*>(pipeline_ + kVectorBytes<kTensors>);
    return slots + stage_ * kMostThreads + threadIdx.x;
  }

 private:
  FASTRES_DEVICE uint4* vector(int i) const {
    return reinterpret_cast<uint4*>(pipeline_) + (stage_ * kTensors + i) * kMostThreads +
           threadIdx.x;
  }

  unsigned char* pipeline_;
  unsigned stage_;
};

// Calls op.fetch(item, slots) for every pack, and op.take(item, slots, place) kPipelineStages - 1
// packs later. Threads of a block make as many calls as each has rows.
template <int kTensors, class Op>
FASTRES_DEVICE void for_each_item_in_pipeline(const Op& op, const Place<kVector, true>& place,
                                              unsigned char* pipeline, bool backwards = false) {
  Position at = backwards ? place.end() : place.begin(), ahead = at;
  const auto step = [&](Position& position) {
    backwards ? place.go_back(position) : place.advance(position);
  };
  // Groups are counted: there is one also where no pack is left to copy.
  const auto fetch = [&](unsigned stage, bool exists) {
    if (exists) {
      op.fetch(place.item(ahead), Slots<kTensors>(pipeline, stage));
      step(ahead);
    }
    commit_copies();
  };
  unsigned stage = 0;
  for (; stage < kPipelineStages - 1; ++stage) {
    fetch(stage, at.left > stage);
  }
  FASTRES_NOT_UNROLLED
  while (at.left > 0) {
    wait_for_copies<kPipelineStages - 2>();
    // Into the slots that were read last; the next ones hold what has been on its way for longest.
    fetch(stage, at.left > kPipelineStages - 1);
    stage = (stage + 1) % kPipelineStages;
    op.take(place.item(at), Slots<kTensors>(pipeline, stage), place);
    step(at);
  }
}

// ---- host ----

// A mask is fetched by words, which hold the bytes of four packs.
template <int kTensors>
size_t pipeline_bytes(Gate gate) {
  const size_t of_gate = gate == Gate::kOutput ? sizeof(uint4) : gate == Gate::kMask ? 4 : 0;
  return kVectorBytes<kTensors> + of_gate * kPipelineStages * kMostThreads;
}

// Calls f(Type<T>, Constant<kSecond>, bytes of the pipeline) for a backward pass: of grad_out, and
// of y for each branch.
template <class F>
void with_pipeline(DType dtype, bool second, Gate gate, const F& f) {
  with_half(dtype, [&](auto type) {
    with_bool(second, [&](auto both) {
      f(type, both, pipeline_bytes<decltype(both)::value ? 3 : 2>(gate));
    });
  });
}

// Whether a launch takes the pipeline that its tiling asks for: a choice that was measured on some
// tensors may meet others. An activation other than ReLU has no kernels with a pipeline.
template <class Args>
bool takes_pipeline(const Args& a, bool vectors) {
  const bool words = a.shape.c % 32 == 0 && reinterpret_cast<uintptr_t>(a.gate_ptr) % 4 == 0;
  const bool other = a.gate == Gate::kAffine && is_other(a.act);
  return a.tiling.stages > 0 && vectors && a.shape.per_column() && !other &&
         a.shape.dtype != DType::kFloat32 && (a.gate != Gate::kMask || words);
}

}  // namespace fastres::cuda
