// Running statistics of a block's batch norms, on the calling thread: they are few.
#include "cpu/kernels.h"

namespace fastres::cpu {
namespace {

template <class S, class R>
void blend_row(const RunningUpdate& u, StatsRow row, const RunningVector& running, double factor) {
  for (int64_t i = 0; i < u.channels; ++i) {
    blend_into<R>(running, i, batch_value<S>(u, row, i), factor);
  }
}

template <class S>
void blend(const RunningUpdate& u, StatsRow row, const RunningVector& running, double factor) {
  if (!running.data) {
    return;
  }
  switch (running.dtype) {
    case DType::kFloat32:
      return blend_row<S, float>(u, row, running, factor);
    case DType::kBFloat16:
      return blend_row<S, BFloat16>(u, row, running, factor);
    case DType::kFloat16:
      return blend_row<S, Float16>(u, row, running, factor);
    case DType::kFloat64:
      return blend_row<S, double>(u, row, running, factor);
  }
}

template <class S>
void take_in(const RunningUpdate& u, double factor) {
  blend<S>(u, kMean, u.mean, factor);
  blend<S>(u, kVar, u.var, factor);
}

}  // namespace

void update_running(const RunningUpdate& u) {
  double factor = u.cumulative ? 0.0 : u.momentum;
  if (u.counter) {
    *u.counter += 1;
    factor = u.cumulative ? 1.0 / double(*u.counter) : factor;
  }
  u.stats_dtype == DType::kFloat64 ? take_in<double>(u, factor) : take_in<float>(u, factor);
}

}  // namespace fastres::cpu
