// The CPU kernels as the bindings see them: plain structs and a table of functions.
#pragma once

#include <cstdint>

#include "fastres/activation.h"
#include "fastres/batch_norm.h"
#include "fastres/dtype.h"
#include "fastres/problem.h"
#include "fastres/running.h"

namespace fastres::cpu {

struct Problem : Activations {
  int threads;
};

struct ChannelStatsArgs {
  const void* y;
  double* state;  // [2, C]: mean, sum of squared deviations
  int64_t prior_count;
  Problem problem;
};

struct ScaleShiftActArgs {
  const void* y;
  const void* scale;           // [C], arithmetic type
  const void* shift;           // [C]
  const void* residual;        // may be null
  const void* residual_scale;  // [C], null when the residual is added as it is
  const void* residual_shift;  // [C]
  void* out;
  uint8_t* mask;  // may be null
  Activation act;
  Problem problem;
};

struct BackwardReduceArgs {
  const void* grad_out;
  Gate gate;
  Activation act;  // whose derivative the gate applies
  const void* gate_ptr;
  const void* y[2];
  const void* stats[2];
  double* sums;  // [3, C]
  bool accumulate;
  Problem problem;
};

struct BackwardApplyArgs {
  const void* grad_out;
  Gate gate;
  Activation act;  // whose derivative the gate applies
  const void* gate_ptr;
  const void* y[2];
  const void* stats[2];
  const double* sums;
  int64_t count;
  void* grad_y[2];
  void* grad_residual;
  Problem problem;
};

struct AddActArgs {
  const void* x;
  const void* r;
  void* out;
  uint8_t* mask;
  Activation act;
  Problem problem;
};

struct ActBackwardArgs {
  const void* grad_out;
  Gate gate;
  Activation act;
  const void* gate_ptr;
  void* grad;
  Problem problem;
};

// Max pooling of [n, c, h, w] to [n, c, out_h, out_w], both channels_last. A tap is a position in
// the window, in row-major order; padding is no tap, and every window has at least one.
struct PoolShape {
  int64_t n, c, h, w;
  int64_t out_h, out_w;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  DType dtype;

  int64_t inputs() const { return n * c * h * w; }
  int64_t outputs() const { return n * c * out_h * out_w; }
};

// The most taps of a window: a tap is stored in a byte.
inline constexpr int64_t kMostTaps = 255;

struct ScaleShiftActPoolArgs {
  const void* y;
  const void* scale;  // [C], arithmetic type
  const void* shift;  // [C]
  void* out;
  uint8_t* argmax;  // the tap that each output came from; may be null
  Activation act;
  PoolShape shape;
  int threads;
};

struct MaxPoolBackwardArgs {
  const void* grad_out;
  const uint8_t* argmax;
  void* grad;  // of what was pooled
  PoolShape shape;
  int threads;
};

struct FinalizeStatsArgs {
  const double* state;  // null: statistics are the running ones
  int64_t count;
  const void* running_mean;
  const void* running_var;
  const void* weight;
  const void* bias;
  double eps;
  void* stats;  // [5, C]
  int64_t c;
  DType dtype;
};

// A convolution [n, c, h, w] -> [n, k, out_h, out_w] with zero padding and without groups; what it
// reads and writes is float32 or bfloat16 (T, below) and lies channels_last.
struct ConvShape {
  int64_t n, h, w, c;
  int64_t k, kh, kw;
  int64_t sh, sw, ph, pw, dh, dw;
  DType dtype = DType::kFloat32;

  int64_t out_h() const { return (h + 2 * ph - dh * (kh - 1) - 1) / sh + 1; }
  int64_t out_w() const { return (w + 2 * pw - dw * (kw - 1) - 1) / sw + 1; }
  int64_t taps() const { return kh * kw; }
};

// What stands in front of a convolution: act(scale * x + shift), or x itself where scale is null.
struct ConvInput {
  const void* x;  // T
  const float* scale;
  const float* shift;
  Activation act;
};

// [k, c, kh, kw] of T in any order.
struct ConvWeight {
  const void* weight;
  int64_t stride_k, stride_c, stride_h, stride_w;
};

struct PackWeightArgs {
  ConvWeight weight;
  bool transposed;  // for the data gradient: the sum is over k
  void* packed;     // steps of four bytes: a float, or two neighbouring bfloat16
  ConvShape shape;
  int threads;
  bool winograd = false;
};

struct ConvForwardArgs {
  ConvInput input;
  ConvWeight weight;
  const void* packed;  // null: blocks of the weight are packed where they are used
  bool winograd;       // packed by pack_winograd: of float32 alone
  const void* bias;    // [k] of T, may be null
  void* y;             // T
  double* state;       // [2, k] mean and sum of squared deviations of y, or null
  // With a scale: y = act(scale * conv + shift [+ residual]).
  const float* scale;
  const float* shift;
  const void* residual;  // T
  Activation act;
  ConvShape shape;
  int threads;
};

struct ConvDataArgs {
  BackwardApplyArgs grad;  // how grad_y is formed, or grad_y itself where stats[0] is null
  ConvWeight weight;
  const void* packed;  // likewise
  bool winograd;
  void* grad_x;               // T
  bool accumulate;            // onto what stands in grad_x
  ActBackwardArgs residual;   // else onto this gated gradient, where its grad_out is not null
  BackwardReduceArgs reduce;  // sums of what grad_x passes on, where its sums are not null
  ConvShape shape;
  int threads;
};

struct ConvWeightArgs {
  BackwardApplyArgs grad;
  ConvInput input;
  void* grad_weight;  // [k, kh, kw, c] of T
  ConvShape shape;
  int threads;
  bool winograd;
};

// How the work of a convolution is shared out.
enum class Pass { kForward, kDataGradient, kWeightGradient };

struct SharesArgs {
  ConvShape shape;
  Pass pass;
  bool winograd;
  int team;
  int64_t* shares;  // of each member, to be compared with one another
};

// A copy between strides, of at most four axes, of float32, bfloat16 or float64 into any of them.
struct CopyArgs {
  const void* from;
  void* to;
  DType from_dtype, to_dtype;
  int64_t shape[4], from_strides[4], to_strides[4];
};

// Convolutions of tensors of one dtype.
struct ConvTable {
  int64_t (*packed_size)(const ConvShape&, bool transposed);
  bool (*packs_ahead)(const ConvShape&, bool transposed);
  void (*pack_weight)(const PackWeightArgs&);
  void (*conv_forward)(const ConvForwardArgs&);
  void (*conv_backward_data)(const ConvDataArgs&);
  void (*conv_backward_weight)(const ConvWeightArgs&);
  void (*shares)(const SharesArgs&);
};

struct KernelTable {
  const char* name;
  bool (*supported)();
  void (*channel_stats)(const ChannelStatsArgs&);
  void (*scale_shift_act)(const ScaleShiftActArgs&);
  void (*backward_reduce)(const BackwardReduceArgs&);
  void (*backward_apply)(const BackwardApplyArgs&);
  void (*add_act)(const AddActArgs&);
  void (*act_backward)(const ActBackwardArgs&);
  void (*scale_shift_act_pool)(const ScaleShiftActPoolArgs&);
  void (*max_pool_backward)(const MaxPoolBackwardArgs&);
  int64_t (*winograd_size)(const ConvShape&, bool transposed);
  void (*pack_winograd)(const PackWeightArgs&);
  ConvTable float32, bfloat16;

  const ConvTable& convolutions(const ConvShape& shape) const {
    return shape.dtype == DType::kBFloat16 ? bfloat16 : float32;
  }
};

// Per channel and tiny: not worth an instruction set of its own.
void finalize_stats(const FinalizeStatsArgs& args);
void update_running(const RunningUpdate& update);
void copy(const CopyArgs& args);
// One value of each output channel of a weight, at another place in each, as one number.
int64_t sample_weight(const void* weight, DType dtype, const int64_t* shape,
                      const int64_t* strides);

// Built tables, best first; `baseline` is always the last one.
const KernelTable* const* built_tables(int* count);
const KernelTable& active_table();
// False where no such table was built or this CPU cannot run it.
bool select_table(const char* name);

}  // namespace fastres::cpu
