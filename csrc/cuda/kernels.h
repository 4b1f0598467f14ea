// The CUDA kernels as the bindings see them: plain structs and functions that launch.
//
// Every function launches on `where.stream` of `where.device`, allocates nothing, waits for
// nothing, and throws std::runtime_error where a launch fails. Tensors are dense; float pointers
// hold one value per channel and row.
#pragma once

#include <cstdint>

#include "fastres/activation.h"
#include "fastres/batch_norm.h"
#include "fastres/problem.h"
#include "fastres/running.h"

namespace fastres::cuda {

struct Where {
  int device;
  void* stream;
};

// How threads share an activation out. A block covers `width` packs side by side (a pack: 8
// elements where sizes and addresses allow vectors, else 1) and as many rows as it has threads
// left, and iterates over `chunk_rows` rows; a row is a pixel under channels_last and an image
// else.
struct Tiling {
  int threads;  // 64, 128 or 256
  int width;    // a power of two; more than a row has packs counts as just enough
  int64_t chunk_rows;
  // Packs of each tensor that a thread keeps on their way through shared memory, where a kernel can
  // (see pipeline.h): kPipelineStages, or 0, where loads go straight to registers.
  int stages = 0;
};

inline constexpr int kPipelineStages = 4;

// Rows of an activation as tilings cut them, and how many parts a tiling makes of them: as many
// partial results does a reduction leave.
int64_t rows_of(const Activations& shape);
int64_t chunks_of(const Activations& shape, const Tiling& tiling);

// Weight, bias (null: 1 and 0) and eps of a batch norm.
struct Affine {
  const float* weight;
  const float* bias;
  double eps;
};

struct ChannelStatsArgs {
  const void* y;
  double* partials;    // [chunks, 2, C]
  const float* prior;  // [2, C]: mean, sum of squared deviations of prior_count values; may be null
  int64_t prior_count;
  float* state;  // [2, C]; may be null
  Affine affine;
  float* stats;  // [5, C], as finalize_stats fills it; may be null
  Activations shape;
  Tiling tiling;
};

struct FinalizeStatsArgs {
  const float* state;  // null: statistics are the running ones
  int64_t count;
  const float* running_mean;
  const float* running_var;
  Affine affine;
  float* stats;  // [5, C]
  int64_t channels;
};

struct ScaleShiftActArgs {
  const void* y;
  const float* stats;           // [5, C]; null: y is taken as it is
  const void* residual;         // may be null
  const float* residual_stats;  // [5, C]; null: the residual is added as it is
  void* out;
  uint8_t* mask;  // may be null
  Activation act;
  Activations shape;
  Tiling tiling;
};

struct BackwardReduceArgs {
  const void* grad_out;
  Gate gate;
  Activation act;  // whose derivative the gate applies
  const void* gate_ptr;
  const void* y[2];       // the second may be null
  const float* stats[2];  // [5, C]
  float* partials;        // [chunks, 1 + branches, C]
  const float* prior;     // [3, C], added; may be null
  float* sums;            // [3, C]; the third row is written where there is a second branch
  Activations shape;
  Tiling tiling;
};

struct BackwardApplyArgs {
  const void* grad_out;
  Gate gate;
  Activation act;  // whose derivative the gate applies
  const void* gate_ptr;
  const void* y[2];
  const float* stats[2];
  const float* sums;  // [3, C]; null: running statistics, which do not depend on y
  int64_t count;
  void* grad_y[2];      // null where it is not wanted
  void* grad_residual;  // may be null
  Activations shape;
  Tiling tiling;
};

// channel_stats, finalize_stats and scale_shift_act one block of channels after the other (a tile
// of `tiling.width` packs, for blocks of kChannelBlockThreads): one cooperative launch reduces a
// channel block and then normalises it, while L2 still holds it. Under channels_last and with
// vectors only. The three share shape and tiling, of at most `norm_forward_blocks` chunks.
struct NormForwardArgs {
  ChannelStatsArgs statistics;
  ScaleShiftActArgs apply;
};

// bn_act_backward_reduce and bn_act_backward_apply, likewise.
struct NormBackwardArgs {
  BackwardReduceArgs reduce;
  BackwardApplyArgs apply;
};

inline constexpr int kChannelBlockThreads = 256;

// Batch norms whose running statistics one launch updates; more of them take several launches.
inline constexpr int kMostUpdates = 8;

void channel_stats(const ChannelStatsArgs& args, const Where& where);
void finalize_stats(const FinalizeStatsArgs& args, const Where& where);
void scale_shift_act(const ScaleShiftActArgs& args, const Where& where);
void backward_reduce(const BackwardReduceArgs& args, const Where& where);
void backward_apply(const BackwardApplyArgs& args, const Where& where);
void norm_forward(const NormForwardArgs& args, const Where& where);
void norm_backward(const NormBackwardArgs& args, const Where& where);
void update_running(const RunningUpdate* updates, int64_t count, const Where& where);

// How many blocks of these two the device holds at once. `second`: with statistics of the residual,
// with a second branch.
int64_t norm_forward_blocks(DType dtype, bool second, const Where& where);
int64_t norm_backward_blocks(DType dtype, bool second, const Where& where);

// 1000 * major + 10 * minor of the newest CUDA that the driver knows; 0 where there is no driver.
int driver_version();

#if defined(FASTRES_CUDA_EMULATION)
inline constexpr bool kEmulated = true;
#else
inline constexpr bool kEmulated = false;
#endif

}  // namespace fastres::cuda
