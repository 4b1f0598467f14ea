// Running statistics of a batch norm, and how they take in a batch.
#pragma once

#include <cstdint>

#include "fastres/batch_norm.h"
#include "fastres/dtype.h"

namespace fastres {

// One value per channel, `stride` elements apart; no data where there is no such buffer.
struct RunningVector {
  void* data;
  int64_t stride;
  DType dtype;
};

struct RunningUpdate {
  const void* stats;  // [5, C], float32 or float64
  int64_t stats_row_stride, stats_stride;
  DType stats_dtype;
  RunningVector mean, var;
  int64_t* counter;  // may be null
  double momentum;
  bool cumulative;  // 1 / counter after its increment, 0 without a counter, instead of momentum
  double unbiased;  // count / (count - 1)
  int64_t channels;
};

// Arithmetic has float64, whatever the storage: a result is rounded once (twice in 16 bits, by way
// of float32).
FASTRES_HD double blended(double running, double batch, double factor) {
  return (1.0 - factor) * running + factor * batch;
}

template <class S>
FASTRES_HD double batch_value(const RunningUpdate& u, StatsRow row, int64_t channel) {
  const S* stats = static_cast<const S*>(u.stats);
  const double value = double(stats[row * u.stats_row_stride + channel * u.stats_stride]);
  return row == kVar ? value * u.unbiased : value;
}

template <class R>
FASTRES_HD void blend_into(const RunningVector& running, int64_t channel, double batch,
                           double factor) {
  R* value = static_cast<R*>(running.data) + channel * running.stride;
  *value = FromAcc<R>::convert(Acc<R>(blended(double(to_acc(*value)), batch, factor)));
}

}  // namespace fastres
