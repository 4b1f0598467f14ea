// What the bindings refuse: undefined codes, and null pointers that would be dereferenced. Tensors
// themselves are checked by the Python adapters.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "fastres/activation.h"
#include "fastres/problem.h"

namespace fastres {

namespace py = pybind11;

using Address = std::uintptr_t;

inline void* at(Address address) { return reinterpret_cast<void*>(address); }

inline void require(bool condition, const std::string& message) {
  if (!condition) {
    throw py::value_error(message);
  }
}

inline void require_address(const char* name, Address address) {
  require(address != 0, std::string(name) + " must be a non-null address, got 0");
}

inline int checked_code(const char* name, int code, int count) {
  require(code >= 0 && code < count, std::string(name) + " must be between 0 and " +
                                         std::to_string(count - 1) + ", got " +
                                         std::to_string(code));
  return code;
}

inline DType checked_dtype(int code) { return DType(checked_code("dtype", code, 4)); }
inline Gate checked_gate(int code) { return Gate(checked_code("gate", code, 4)); }
inline Activation checked_act(int code) {
  return Activation(checked_code("act", code, kActivations));
}

inline void require_size(const char* name, int64_t size) {
  require(size >= 0, std::string(name) + " must be non-negative, got " + std::to_string(size));
}

inline Activations checked_shape(int64_t n, int64_t c, int64_t hw, int layout, int dtype) {
  require_size("n", n);
  require_size("c", c);
  require_size("hw", hw);
  return {n, c, hw, Layout(checked_code("layout", layout, 2)), checked_dtype(dtype)};
}

// Addresses of empty tensors may be null; nothing is read behind them.
inline void require_data(const char* name, Address address, const Activations& shape) {
  if (shape.numel() > 0) {
    require_address(name, address);
  }
}

inline void require_gate_source(Gate gate, Address gate_ptr, Address y1, Address stats1,
                                const Activations& shape) {
  if (gate == Gate::kMask || gate == Gate::kOutput) {
    require_data("gate_ptr", gate_ptr, shape);
  } else if (gate == Gate::kAffine) {
    require_data("y1", y1, shape);
    require_address("stats1", stats1);
  }
}

}  // namespace fastres
