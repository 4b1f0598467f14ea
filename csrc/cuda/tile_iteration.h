// Which elements a thread visits, in which order; the same for every kernel over activations.
//
// Under channels_last a row is a pixel, a block owns the channels of `width` packs, and a thread's
// channels stay the same over all its rows. Under the contiguous layout a row is an image, a block
// owns one channel, and the packs of that channel's pixels are visited `width` at a time.
//
// Reductions go backwards, over chunks and rows: they begin where what they read was written last,
// and end where the pass behind them begins. What is there may be in L2.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "cuda/kernels.h"
#include "cuda/platform.h"

namespace fastres::cuda {

inline constexpr int kMostThreads = 256;
// Elements of a thread's vector access in 16 bits; in float32 it makes two of them.
inline constexpr int kVector = 8;

struct TileIteration {
  int64_t rows;
  int64_t row_stride;       // elements
  int64_t mask_row_stride;  // bytes
  int64_t channels;
  int64_t packs;         // of a row
  int64_t padded_packs;  // the same in whole widths
  int64_t tiles;         // blocks side by side
  int64_t chunk_rows;
  int64_t chunks;
  int64_t pixels;        // values of a channel in a row
  int64_t round_stride;  // elements from one of a thread's rows to the next
  int width, width_bits;
  int lanes, lane_bits;  // threads of a block that share a column
};

// One pack: where it is, and whether there is one.
struct Item {
  int64_t offset;  // elements
  int64_t mask;    // bytes
  bool exists;
};

// Where a thread is on its way. What changes from pack to pack is carried along: nothing is divided
// or multiplied there.
struct Position {
  int64_t left;  // rows of the thread, from this one on
  int near;      // the same where there are few, see `look_ahead`
  int64_t row, pack;
  int64_t offset;  // elements
};

// What a thread of a block visits: in rounds, which are its rows, from one width to the next.
template <int kPack, bool kPerColumn>
class Place {
 public:
  // Channels that a thread holds values of.
  static constexpr int kSlots = kPerColumn ? kPack : 1;

  FASTRES_DEVICE Place(const TileIteration& iteration, int64_t chunk, int64_t tile)
      : iteration_(iteration), tile_(tile), chunk_(chunk) {
    lane_ = int(threadIdx.x) >> iteration.width_bits;
    col_ = int(threadIdx.x) & (iteration.width - 1);
    const int64_t rows_left = iteration.rows - first_row();
    rows_ = iteration.chunk_rows < rows_left ? iteration.chunk_rows : rows_left;
  }

  // Ordinary launches: tiles side by side, so that neighbouring blocks read neighbouring memory.
  FASTRES_DEVICE explicit Place(const TileIteration& iteration)
      : Place(iteration, blockIdx.x / unsigned(iteration.tiles),
              blockIdx.x % unsigned(iteration.tiles)) {}

  // The same, the last chunk first.
  FASTRES_DEVICE static Place from_the_end(const TileIteration& iteration) {
    const unsigned tiles = unsigned(iteration.tiles);
    return {iteration, iteration.chunks - 1 - blockIdx.x / tiles, blockIdx.x % tiles};
  }

  FASTRES_DEVICE int64_t chunk() const { return chunk_; }
  FASTRES_DEVICE int lane() const { return lane_; }
  FASTRES_DEVICE int lanes() const { return iteration_.lanes; }
  FASTRES_DEVICE int64_t channel(int slot) const {
    return kPerColumn ? first_pack() * kPack + slot : tile_;
  }
  FASTRES_DEVICE bool has_channels() const {
    return !kPerColumn || first_pack() < iteration_.packs;
  }

  // The same for all threads of a block.
  FASTRES_DEVICE int64_t steps() const { return rounds(rows_) * widths(); }
  FASTRES_DEVICE int64_t widths() const {
    return kPerColumn ? 1 : iteration_.padded_packs >> iteration_.width_bits;
  }

  // The thread's first pack, or its last one.
  FASTRES_DEVICE Position begin() const { return position(0, 0, own_rounds()); }
  FASTRES_DEVICE Position end() const {
    return position(own_rounds() - 1, widths() - 1, own_rounds());
  }
  FASTRES_DEVICE Position position(int64_t round, int64_t width, int64_t left) const {
    const int64_t row = first_row() + round * iteration_.lanes + lane_;
    const int64_t pack = kPerColumn ? first_pack() : width * iteration_.width + col_;
    const int64_t image = kPerColumn ? 0 : tile_ * iteration_.pixels;
    return {left, 0, row, pack, row * iteration_.row_stride + image + pack * kPack};
  }

  // Before so many packs are visited: 32 bits will tell which of them exist.
  FASTRES_DEVICE void look_ahead(Position& at, int packs) const {
    at.near = at.left < packs ? int(at.left) : packs;
  }

  FASTRES_DEVICE Item item(const Position& at) const {
    return {at.offset, mask_byte(at), at.near > 0 && (kPerColumn || at.pack < iteration_.packs)};
  }

  FASTRES_DEVICE void advance(Position& at) const {
    if constexpr (!kPerColumn) {
      at.pack += iteration_.width;
      at.offset += iteration_.width * kPack;
      if (at.pack < iteration_.padded_packs) {
        return;
      }
      at.pack -= iteration_.padded_packs;
      at.offset -= iteration_.padded_packs * kPack;
    }
    at.row += iteration_.lanes;
    at.offset += iteration_.round_stride;
    --at.left;
    --at.near;
  }

  FASTRES_DEVICE void go_back(Position& at) const {
    if constexpr (!kPerColumn) {
      at.pack -= iteration_.width;
      at.offset -= iteration_.width * kPack;
      if (at.pack >= 0) {
        return;
      }
      at.pack += iteration_.padded_packs;
      at.offset += iteration_.padded_packs * kPack;
    }
    at.row -= iteration_.lanes;
    at.offset -= iteration_.round_stride;
    --at.left;
    --at.near;
  }

  // Position within its mask byte of the thread's only element.
  FASTRES_DEVICE int mask_bit() const { return col_ & 7; }

 private:
  FASTRES_DEVICE int64_t first_row() const { return chunk_ * iteration_.chunk_rows; }
  FASTRES_DEVICE int64_t first_pack() const { return tile_ * iteration_.width + col_; }
  FASTRES_DEVICE int64_t rounds(int64_t rows) const {
    return (rows + iteration_.lanes - 1) >> iteration_.lane_bits;
  }
  FASTRES_DEVICE int64_t own_rounds() const { return has_channels() ? rounds(rows_ - lane_) : 0; }

  FASTRES_DEVICE int64_t mask_byte(const Position& at) const {
    if constexpr (kPack == 8) {  // all rows are whole bytes
      return at.offset >> 3;
    }
    const int64_t image = kPerColumn ? 0 : tile_ * ((iteration_.pixels + 7) / 8);
    return at.row * iteration_.mask_row_stride + image + (at.pack >> 3);
  }

  const TileIteration& iteration_;
  int64_t tile_, chunk_, rows_;
  int lane_, col_;
};

// Calls op.apply(items, place) for kUnroll packs at a time, so that so many loads of each tensor
// are in flight. All threads of a block make the same number of calls.
template <int kUnroll, class Op, class P>
FASTRES_DEVICE void for_each_item(const Op& op, const P& place, bool backwards = false) {
  const int64_t steps = place.steps();
  Position at = backwards ? place.end() : place.begin();
  FASTRES_NOT_UNROLLED
  for (int64_t step = 0; step < steps; step += kUnroll) {
    Item items[kUnroll];
    place.look_ahead(at, kUnroll);
    FASTRES_UNROLLED
    for (int u = 0; u < kUnroll; ++u) {
      items[u] = place.item(at);
      backwards ? place.go_back(at) : place.advance(at);
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
  if (t.stages != 0 && t.stages != kPipelineStages) {
    throw std::invalid_argument("stages must be 0 or " + std::to_string(kPipelineStages) +
                                ", got " + std::to_string(t.stages));
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

inline int bits_of(int power_of_two) {
  int bits = 0;
  while (1 << bits < power_of_two) {
    ++bits;
  }
  return bits;
}

inline TileIteration tile_iteration(const Activations& s, const Tiling& t, int pack) {
  check_tiling(t);
  const bool last = s.per_column();
  TileIteration w;
  w.rows = rows_of(s);
  w.row_stride = last ? s.c : s.c * s.hw;
  w.mask_row_stride = last ? ceil_div(s.c, 8) : s.c * ceil_div(s.hw, 8);
  w.channels = s.c;
  w.packs = s.cols() / pack;
  w.width = width_of(t, w.packs, pack);
  w.width_bits = bits_of(w.width);
  w.padded_packs = ceil_div(w.packs, w.width) * w.width;
  w.tiles = last ? ceil_div(w.packs, w.width) : s.c;
  w.chunk_rows = t.chunk_rows;
  w.chunks = chunks_of(s, t);
  w.pixels = last ? 1 : s.hw;
  w.lanes = t.threads / w.width;
  w.lane_bits = bits_of(w.lanes);
  w.round_stride = w.lanes * w.row_stride;
  return w;
}

inline LaunchShape launch_shape(const TileIteration& w, const Tiling& t, size_t shared_bytes = 0) {
  return {w.tiles * w.chunks, t.threads, shared_bytes};
}

}  // namespace fastres::cuda
