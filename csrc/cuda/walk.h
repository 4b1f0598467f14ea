// Which elements a thread visits, in which order; the same for every kernel over activations.
//
// Under channels_last a row is a pixel, a block owns the channels of `width` packs, and a thread's
// channels stay the same over all its rows. Under the contiguous layout a row is an image, a block
// owns one channel, and the packs of that channel's pixels are walked `width` at a time.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "cuda/kernels.h"
#include "cuda/platform.h"

namespace fastres::cuda {

inline constexpr int kMostThreads = 256;
// Elements of a thread's vector access in 16 bits; in float32 it makes two of them.
inline constexpr int kVector = 8;

struct Walk {
  int64_t rows;
  int64_t row_stride;       // elements
  int64_t mask_row_stride;  // bytes
  int64_t channels;
  int64_t packs;  // of a row
  int64_t tiles;  // blocks side by side
  int64_t chunk_rows;
  int64_t chunks;
  int64_t pixels;  // values of a channel in a row
  int width;
};

// One pack: where it is, and whether there is one.
struct Item {
  int64_t offset;  // elements
  int64_t mask;    // bytes
  bool exists;
};

// What a thread of a block visits.
template <int kPack, bool kPerColumn>
class Place {
 public:
  // Channels that a thread holds values of.
  static constexpr int kSlots = kPerColumn ? kPack : 1;

  FASTRES_DEVICE Place(const Walk& walk, int64_t chunk, int64_t tile)
      : walk_(walk), tile_(tile), chunk_(chunk) {
    lane_ = int(threadIdx.x) / walk.width;
    lanes_ = int(blockDim.x) / walk.width;
    col_ = int(threadIdx.x) % walk.width;
    first_row_ = chunk * walk.chunk_rows + lane_;
    end_row_ = first_row_ - lane_ + walk.chunk_rows;
    end_row_ = end_row_ < walk.rows ? end_row_ : walk.rows;
  }

  // Ordinary launches: tiles side by side, so that neighbouring blocks read neighbouring memory.
  FASTRES_DEVICE explicit Place(const Walk& walk)
      : Place(walk, int64_t(blockIdx.x) / walk.tiles, int64_t(blockIdx.x) % walk.tiles) {}

  FASTRES_DEVICE int64_t chunk() const { return chunk_; }
  FASTRES_DEVICE int lane() const { return lane_; }
  FASTRES_DEVICE int lanes() const { return lanes_; }
  FASTRES_DEVICE int64_t channel(int slot) const {
    return kPerColumn ? first_pack() * kPack + slot : tile_;
  }
  FASTRES_DEVICE bool has_channels() const { return !kPerColumn || first_pack() < walk_.packs; }

  // The same for all threads of a block.
  FASTRES_DEVICE int64_t steps() const {
    const int64_t begin = first_row_ - lane_;
    return begin < end_row_ ? (end_row_ - begin + lanes_ - 1) / lanes_ * cols() : 0;
  }

  FASTRES_DEVICE Item item(int64_t step) const {
    int64_t row, pack, offset, mask;
    if constexpr (kPerColumn) {
      row = first_row_ + step * lanes_;
      pack = first_pack();
      offset = row * walk_.row_stride + pack * kPack;
      mask = row * walk_.mask_row_stride + pack * kPack / 8;
    } else {
      row = first_row_ + step / cols() * lanes_;
      pack = step % cols() * walk_.width + col_;
      offset = row * walk_.row_stride + tile_ * walk_.pixels + pack * kPack;
      mask = row * walk_.mask_row_stride + tile_ * ((walk_.pixels + 7) / 8) + pack * kPack / 8;
    }
    return {offset, mask, row < end_row_ && pack < walk_.packs};
  }

  // Position within its mask byte of the thread's only element.
  FASTRES_DEVICE int mask_bit() const { return col_ & 7; }

 private:
  FASTRES_DEVICE int64_t first_pack() const { return tile_ * walk_.width + col_; }
  // Steps across a row.
  FASTRES_DEVICE int64_t cols() const {
    return kPerColumn ? 1 : (walk_.packs + walk_.width - 1) / walk_.width;
  }

  const Walk& walk_;
  int64_t tile_, chunk_, first_row_, end_row_;
  int lane_, lanes_, col_;
};

// Calls op.apply(items, place) for kUnroll packs at a time, so that so many loads of each tensor
// are in flight. All threads of a block make the same number of calls.
template <int kUnroll, class Op, class P>
FASTRES_DEVICE void for_each_item(const Op& op, const P& place, bool backwards = false) {
  const int64_t steps = place.steps();
  FASTRES_NOT_UNROLLED
  for (int64_t step = 0; step < steps; step += kUnroll) {
    Item items[kUnroll];
    FASTRES_UNROLLED
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = backwards ? steps - 1 - step - u : step + u;
      items[u] = place.item(at);
      items[u].exists = items[u].exists && at >= 0;
    }
    op.apply(items, place);
  }
}

// ---- host ----

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check_tiling(const Tiling& t) {
  const auto power_of_two = [](int v) { return v > 0 && (v & (v - 1)) == 0; };
  if (!power_of_two(t.threads) || t.threads < 64 || t.threads > kMostThreads) {
    throw std::invalid_argument("threads must be 64, 128 or 256, got " + std::to_string(t.threads));
  }
  if (!power_of_two(t.width)) {
    throw std::invalid_argument("width must be a power of two, got " + std::to_string(t.width));
  }
  if (t.chunk_rows < 1) {
    throw std::invalid_argument("chunk_rows must be positive, got " + std::to_string(t.chunk_rows));
  }
}

// A mask's byte is put together by 8 neighbouring threads where a pack is one element.
inline int width_of(const Tiling& t, int64_t packs, int pack) {
  int width = 1;
  while (width < t.width && width < t.threads && width < packs) {
    width *= 2;
  }
  return pack == 1 ? std::max(width, 8) : width;
}

inline Walk make_walk(const Activations& s, const Tiling& t, int pack) {
  check_tiling(t);
  const bool last = s.per_column();
  Walk w;
  w.rows = rows_of(s);
  w.row_stride = last ? s.c : s.c * s.hw;
  w.mask_row_stride = last ? ceil_div(s.c, 8) : s.c * ceil_div(s.hw, 8);
  w.channels = s.c;
  w.packs = s.cols() / pack;
  w.width = width_of(t, w.packs, pack);
  w.tiles = last ? ceil_div(w.packs, w.width) : s.c;
  w.chunk_rows = t.chunk_rows;
  w.chunks = chunks_of(s, t);
  w.pixels = last ? 1 : s.hw;
  return w;
}

inline LaunchShape launch_shape(const Walk& w, const Tiling& t, size_t shared_bytes = 0) {
  return {w.tiles * w.chunks, t.threads, shared_bytes};
}

}  // namespace fastres::cuda
