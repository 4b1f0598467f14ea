// Per-channel coefficients of batch normalisation; derivations in csrc/README.md.
#pragma once

#include <math.h>

#include "fastres/macros.h"

namespace fastres {

// Rows of a `stats` buffer [5, C].
enum StatsRow : int { kMean = 0, kVar = 1, kInvstd = 2, kScale = 3, kShift = 4, kStatsRows = 5 };

// Rows of a `sums` buffer [3, C].
enum SumsRow : int { kSumG = 0, kSumGX1 = 1, kSumGX2 = 2, kSumsRows = 3 };

// z = scale * y + shift
struct ForwardCoefficients {
  double invstd, scale, shift;
};

FASTRES_HD ForwardCoefficients forward_coefficients(double mean, double var, double weight,
                                                    double bias, double eps) {
  const double invstd = 1.0 / sqrt(var + eps);
  const double scale = weight * invstd;
  return {invstd, scale, bias - mean * scale};
}

// grad_y = a * g + b * y + c
struct BackwardCoefficients {
  double a, b, c;
};

// count == 0: running statistics were used, so they do not depend on y.
FASTRES_HD BackwardCoefficients backward_coefficients(double mean, double invstd, double scale,
                                                      double sum_g, double sum_gx, double count) {
  if (count == 0) {
    return {scale, 0.0, 0.0};
  }
  const double b = -scale * invstd * sum_gx / count;
  return {scale, b, -scale * sum_g / count - b * mean};
}

}  // namespace fastres
