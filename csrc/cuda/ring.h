// Packs on their way to a thread, in a ring of slots in shared memory: the copies of the next ones
// are under way while it computes, and take no registers. A thread fills and reads its own slots
// alone, so nobody waits for anybody else.
//
// For vectors of 16-bit storage under channels_last.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/pack.h"

namespace fastres::cuda {

// What comes first in a ring: the vectors of so many tensors.
template <int kTensors>
inline constexpr size_t kVectorBytes = sizeof(uint4) * kRingStages * kMostThreads * kTensors;

// What a stage of the ring holds for the calling thread: vectors of so many tensors, and what the
// gate reads.
template <int kTensors>
class Slots {
 public:
  FASTRES_DEVICE Slots(unsigned char* ring, unsigned stage) : ring_(ring), stage_(stage) {}

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
    V* slots = reinterpret_cast<V*>(ring_ + kVectorBytes<kTensors>);
    return slots + stage_ * kMostThreads + threadIdx.x;
  }

 private:
  FASTRES_DEVICE uint4* vector(int i) const {
    return reinterpret_cast<uint4*>(ring_) + (stage_ * kTensors + i) * kMostThreads + threadIdx.x;
  }

  unsigned char* ring_;
  unsigned stage_;
};

// Calls op.fetch(item, slots) for every pack, and op.take(item, slots, place) kRingStages - 1 packs
// later.
// Threads of a block make as many calls as each has rows.
template <int kTensors, class Op>
FASTRES_DEVICE void for_each_item_in_ring(const Op& op, const Place<kVector, true>& place,
                                          unsigned char* ring, bool backwards = false) {
  Position at = backwards ? place.end() : place.begin(), ahead = at;
  const auto step = [&](Position& position) {
    backwards ? place.go_back(position) : place.advance(position);
  };
  // Groups are counted: there is one also where no pack is left to copy.
  const auto fetch = [&](unsigned stage, bool exists) {
    if (exists) {
      op.fetch(place.item(ahead), Slots<kTensors>(ring, stage));
      step(ahead);
    }
    commit_copies();
  };
  unsigned stage = 0;
  for (; stage < kRingStages - 1; ++stage) {
    fetch(stage, at.left > stage);
  }
  FASTRES_NOT_UNROLLED
  while (at.left > 0) {
    wait_for_copies<kRingStages - 2>();
    // Into the slots that were read last; the next ones hold what has been on its way for longest.
    fetch(stage, at.left > kRingStages - 1);
    stage = (stage + 1) % kRingStages;
    op.take(place.item(at), Slots<kTensors>(ring, stage), place);
    step(at);
  }
}

// ---- host ----

// A mask is fetched by words, which hold the bytes of four packs.
template <int kTensors>
size_t ring_bytes(Gate gate) {
  const size_t of_gate = gate == Gate::kOutput ? sizeof(uint4) : gate == Gate::kMask ? 4 : 0;
  return kVectorBytes<kTensors> + of_gate * kRingStages * kMostThreads;
}

// Calls f(Type<T>, Constant<kSecond>, bytes of the ring) for a backward pass: of grad_out, and of y
// for each branch.
template <class F>
void with_ring(DType dtype, bool second, Gate gate, const F& f) {
  with_half(dtype, [&](auto type) {
    with_bool(second,
              [&](auto both) { f(type, both, ring_bytes<decltype(both)::value ? 3 : 2>(gate)); });
  });
}

// Whether a launch takes the ring that its tiling asks for: a choice that was measured on some
// tensors may meet others. An activation other than ReLU has no kernels with a ring.
template <class Args>
bool takes_ring(const Args& a, bool vectors) {
  const bool words = a.shape.c % 32 == 0 && reinterpret_cast<uintptr_t>(a.gate_ptr) % 4 == 0;
  const bool other = a.gate == Gate::kAffine && is_other(a.act);
  return a.tiling.stages > 0 && vectors && a.shape.per_column() && !other &&
         a.shape.dtype != DType::kFloat32 && (a.gate != Gate::kMask || words);
}

}  // namespace fastres::cuda
