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

struct KernelTable {
  const char* name;
  bool (*supported)();
  void (*channel_stats)(const ChannelStatsArgs&);
  void (*scale_shift_act)(const ScaleShiftActArgs&);
  void (*backward_reduce)(const BackwardReduceArgs&);
  void (*backward_apply)(const BackwardApplyArgs&);
  void (*add_act)(const AddActArgs&);
  void (*act_backward)(const ActBackwardArgs&);
};

// Per channel and tiny: not worth an instruction set of its own.
void finalize_stats(const FinalizeStatsArgs& args);
void update_running(const RunningUpdate& update);

// Built tables, best first; `baseline` is always the last one.
const KernelTable* const* built_tables(int* count);
const KernelTable& active_table();
// False where no such table was built or this CPU cannot run it.
bool select_table(const char* name);

}  // namespace fastres::cpu
