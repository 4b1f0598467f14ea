// What the kernels have in common that reduce and then apply one block of channels after the other.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/merge.h"

namespace fastres::cuda {

// The channel blocks' blocks merge too, and iterate over packs of as many channels as a merge
// takes.
static_assert(kChannelBlockThreads == kMergeThreads && kVector == kMergeChannels);

// Calls reduce(place), merge(share) and apply(place) for a channel block; between them the whole
// grid waits. Rows are reduced last one first, and applied first one first: the last ones read are
// the likeliest to be in L2.
template <class Reduce, class Merge, class Apply>
FASTRES_DEVICE void run_channel_block(const TileIteration& iteration, int64_t channel_block,
                                      const Reduce& reduce, const Merge& merge,
                                      const Apply& apply) {
  const Place<kVector, true> place(iteration, blockIdx.x, channel_block);
  reduce(place);
  grid_barrier();
  for (int64_t pack = blockIdx.x; pack < iteration.width; pack += gridDim.x) {
    merge(MergeShare(channel_block * iteration.width + pack, iteration.chunks));
  }
  grid_barrier();
  apply(place);
}

inline TileIteration channel_block_iteration(const Activations& shape, const Tiling& tiling,
                                             bool vectors) {
  if (!shape.per_column() || !vectors || tiling.threads != kChannelBlockThreads) {
    throw std::invalid_argument("channel blocks must be channels_last, in whole vectors, of " +
                                std::to_string(kChannelBlockThreads) + " threads");
  }
  return tile_iteration(shape, tiling, kVector);
}

// One launch per channel block: a loop over the channel blocks inside the kernel makes the compiler
// keep what does not change between them, in half as many registers again. As many blocks as there
// are chunks: each has its own rows in every channel block.
template <class Kernel>
void launch_channel_blocks(const char* name, void (*kernel)(Kernel), Kernel k, size_t shared_bytes,
                           void* stream) {
  for (k.channel_block = 0; k.channel_block < k.iteration.tiles; ++k.channel_block) {
    launch_cooperative(name, kernel, {k.iteration.chunks, kChannelBlockThreads, shared_bytes},
                       stream, k);
  }
}

}  // namespace fastres::cuda
