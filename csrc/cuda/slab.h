// What the kernels have in common that reduce and then apply slab after slab of channels.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/merge.h"

namespace fastres::cuda {

// The slabs' blocks merge too, and walk over packs of as many channels as a merge takes.
static_assert(kSlabThreads == kMergeThreads && kVector == kMergeChannels);

// Calls reduce(place), merge(share) and apply(place) for a slab; between them the whole grid waits.
// Rows are reduced last one first, and applied first one first: the last ones read are the
// likeliest to be in L2.
template <class Reduce, class Merge, class Apply>
FASTRES_DEVICE void run_slab(const Walk& walk, int64_t slab, const Reduce& reduce,
                             const Merge& merge, const Apply& apply) {
  const Place<kVector, true> place(walk, blockIdx.x, slab);
  reduce(place);
  grid_barrier();
  for (int64_t pack = blockIdx.x; pack < walk.width; pack += gridDim.x) {
    merge(MergeShare(slab * walk.width + pack, walk.chunks));
  }
  grid_barrier();
  apply(place);
}

inline Walk slab_walk(const Activations& shape, const Tiling& tiling, bool vectors) {
  if (!shape.per_column() || !vectors || tiling.threads != kSlabThreads) {
    throw std::invalid_argument("slabs must be channels_last, in whole vectors, of " +
                                std::to_string(kSlabThreads) + " threads");
  }
  return make_walk(shape, tiling, kVector);
}

// One launch per slab: a loop over the slabs inside the kernel makes the compiler keep what does
// not change between them, in half as many registers again. As many blocks as there are chunks:
// each has its own rows in every slab.
template <class Kernel>
void launch_slabs(const char* name, void (*kernel)(Kernel), Kernel k, size_t shared_bytes,
                  void* stream) {
  for (k.slab = 0; k.slab < k.walk.tiles; ++k.slab) {
    launch_cooperative(name, kernel, {k.walk.chunks, kSlabThreads, shared_bytes}, stream, k);
  }
}

}  // namespace fastres::cuda
