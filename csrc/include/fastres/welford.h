// Mean and sum of squared deviations of a set of values, and how two sets join.
#pragma once

#include "fastres/macros.h"

namespace fastres {

struct WelfordState {
  double count;
  double mean;
  double m2;  // sum of (value - mean)^2
};

// Chan, Golub, LeVeque 1979. An empty side leaves the other one bit for bit as it was.
FASTRES_HD WelfordState merge(const WelfordState& a, const WelfordState& b) {
  if (b.count == 0) {
    return a;
  }
  if (a.count == 0) {
    return b;
  }
  const double count = a.count + b.count;
  const double delta = b.mean - a.mean;
  const double share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// From sums of d = value - shift: sum_d = sum(d), sum_dd = sum(d * d).
FASTRES_HD WelfordState from_shifted_sums(double count, double shift, double sum_d, double sum_dd) {
  const double offset = sum_d / count;
  const double m2 = sum_dd - sum_d * offset;
  return {count, shift + offset, m2 < 0 ? 0 : m2};
}

}  // namespace fastres
