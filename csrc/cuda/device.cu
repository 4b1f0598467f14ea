// What is asked about problems and devices, apart from any kernel.
#include "cuda/tile_iteration.h"

namespace fastres::cuda {

int64_t rows_of(const Activations& s) { return s.per_column() ? s.n * s.hw : s.n; }

int64_t chunks_of(const Activations& s, const Tiling& t) {
  check_tiling(t);
  return ceil_div(rows_of(s), t.chunk_rows);
}

int driver_version() {
  int version = 0;
#if !defined(FASTRES_CUDA_EMULATION)
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion", {});
#endif
  return version;
}

}  // namespace fastres::cuda
