// Updates of running statistics as the adapters describe them, one tuple for each batch norm.
#pragma once

#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "fastres/running.h"

namespace fastres {

// (address, dtype, stride)
using VectorCode = std::tuple<Address, int, int64_t>;
// (stats, its dtype, its strides, channels, mean, var, counter, momentum, count)
using UpdateCode = std::tuple<Address, int, std::tuple<int64_t, int64_t>, int64_t, VectorCode,
                              VectorCode, Address, std::optional<double>, int64_t>;

inline RunningVector checked_running(const VectorCode& code) {
  const auto [data, dtype, stride] = code;
  return {at(data), stride, checked_dtype(dtype)};
}

// Everything is checked before anything is written.
inline std::vector<RunningUpdate> checked_updates(const std::vector<UpdateCode>& codes) {
  std::vector<RunningUpdate> updates;
  updates.reserve(codes.size());
  for (const auto& [stats, dtype, strides, channels, mean, var, counter, momentum, count] : codes) {
    require_size("channels", channels);
    require_size("count", count);
    const DType type = checked_dtype(dtype);
    require(type == DType::kFloat32 || type == DType::kFloat64, "stats must be float32 or float64");
    if (channels > 0) {
      require_address("stats", stats);
    }
    updates.push_back({at(stats), std::get<0>(strides), std::get<1>(strides), type,
                       checked_running(mean), checked_running(var),
                       static_cast<int64_t*>(at(counter)), momentum.value_or(0.0),
                       !momentum.has_value(), double(count) / double(count - 1), channels});
  }
  return updates;
}

}  // namespace fastres
