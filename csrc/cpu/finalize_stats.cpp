// From merged statistics to the per-channel values that the other kernels read.
#include "cpu/kernels.h"

namespace fastres::cpu {
namespace {

template <class A>
void run(const FinalizeStatsArgs& a) {
  const A* running_mean = static_cast<const A*>(a.running_mean);
  const A* running_var = static_cast<const A*>(a.running_var);
  const A* weight = static_cast<const A*>(a.weight);
  const A* bias = static_cast<const A*>(a.bias);
  A* stats = static_cast<A*>(a.stats);
  for (int64_t i = 0; i < a.c; ++i) {
    double mean = 0, var = 0;
    if (!a.state) {
      mean = double(running_mean[i]);
      var = double(running_var[i]);
    } else if (a.count > 0) {
      mean = a.state[i];
      var = a.state[a.c + i] / double(a.count);
    }
    const ForwardCoefficients k = forward_coefficients(mean, var, weight ? double(weight[i]) : 1.0,
                                                       bias ? double(bias[i]) : 0.0, a.eps);
    stats[kMean * a.c + i] = A(mean);
    stats[kVar * a.c + i] = A(var);
    stats[kInvstd * a.c + i] = A(k.invstd);
    stats[kScale * a.c + i] = A(k.scale);
    stats[kShift * a.c + i] = A(k.shift);
  }
}

}  // namespace

void finalize_stats(const FinalizeStatsArgs& a) {
  if (a.dtype == DType::kFloat64) {
    run<double>(a);
  } else {
    run<float>(a);
  }
}

}  // namespace fastres::cpu
