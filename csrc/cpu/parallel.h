// Threads, and the ranges they work on.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace fastres::cpu::FASTRES_ISA {

// Below this a second thread costs more than it saves.
inline constexpr int64_t kBytesPerThread = 64 * 1024;

struct Range {
  int64_t begin, end;
};

FASTRES_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
FASTRES_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
FASTRES_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTRES_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One member of the team that runs a kernel.
struct Worker {
  int id, team;

  // This worker's part of `total` items, cut at multiples of `grain`.
  FASTRES_INLINE Range share(int64_t total, int64_t grain = 1) const {
    const int64_t units = ceil_div(total, grain);
    return {at_most(units * id / team * grain, total),
            at_most(units * (id + 1) / team * grain, total)};
  }

  FASTRES_INLINE void wait_for_all() const {
#ifdef _OPENMP
    if (team > 1) {
#pragma omp barrier
    }
#endif
  }
};

// Calls body(worker) once per member. What a kernel computes must not depend on the team's size.
template <class Body>
void parallel(int threads, int64_t bytes, const Body& body) {
  const int team = int(at_least(1, at_most(threads, bytes / kBytesPerThread)));
#ifdef _OPENMP
  if (team > 1) {
#pragma omp parallel num_threads(team)
    body(Worker{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  body(Worker{0, 1});
}

// ---- from run-time codes to template arguments ----

template <class T>
struct TypeTag {
  using type = T;
};

template <class F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kBFloat16:
      return f(TypeTag<BFloat16>{});
    case DType::kFloat16:
      return f(TypeTag<Float16>{});
    case DType::kFloat64:
      return f(TypeTag<double>{});
  }
}

template <bool kValue>
struct BoolTag {
  static constexpr bool value = kValue;
};

template <class F>
void with_flag(bool flag, const F& f) {
  if (flag) {
    f(BoolTag<true>{});
  } else {
    f(BoolTag<false>{});
  }
}

// How a kernel gates: as the caller says, for ReLU's two kinds by a comparison, and by the function
// of any other activation.
enum class Gating { kNone, kMask, kReluOfY, kReluOfOutput, kAny };

template <Gating kValue>
struct GatingTag {
  static constexpr Gating value = kValue;
};

template <class F>
void with_gating(Gate gate, Activation act, const F& f) {
  const bool mask = gate == Gate::kMask;
  if (gate == Gate::kNone || (act == Activation::kNone && !mask)) {
    f(GatingTag<Gating::kNone>{});
  } else if (mask) {
    f(GatingTag<Gating::kMask>{});
  } else if (act != Activation::kRelu) {
    f(GatingTag<Gating::kAny>{});
  } else if (gate == Gate::kAffine) {
    f(GatingTag<Gating::kReluOfY>{});
  } else {
    f(GatingTag<Gating::kReluOfOutput>{});
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
