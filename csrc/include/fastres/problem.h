// How kernels are told about an activation [N, C, H, W]: sizes, layout, dtype.
#pragma once

#include <cstdint>

#include "fastres/dtype.h"
#include "fastres/macros.h"

namespace fastres {

enum class Layout : int { kChannelsLast = 0, kContiguous = 1 };

struct Activations {
  int64_t n, c, hw;
  Layout layout;
  DType dtype;

  // An activation is a dense matrix: one row per pixel (parameters belong to columns) under
  // channels_last, one row per image and channel (parameters belong to rows) otherwise.
  FASTRES_HD bool per_column() const { return layout == Layout::kChannelsLast; }
  FASTRES_HD int64_t rows() const { return per_column() ? n * hw : n * c; }
  FASTRES_HD int64_t cols() const { return per_column() ? c : hw; }
  FASTRES_HD int64_t count() const { return n * hw; }
  FASTRES_HD int64_t numel() const { return n * c * hw; }
};

}  // namespace fastres
