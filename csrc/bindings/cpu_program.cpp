// fastres._cpu: recordings and programs.
#include "bindings/cpu_program.h"

#include <array>
#include <memory>
#include <tuple>
#include <vector>

#include <pybind11/stl.h>

#include "bindings/checks.h"
#include "cpu/program.h"

namespace fastres::cpu {
namespace {

// (address, bytes)
using MemoryCode = std::tuple<Address, int64_t>;
// (which of the memories given, dtype, shape, strides, sample)
using PackedCode = std::tuple<size_t, int, std::array<int64_t, 4>, std::array<int64_t, 4>, int64_t>;

std::vector<Memory> memories(const std::vector<MemoryCode>& codes) {
  std::vector<Memory> all;
  for (const auto& [begin, bytes] : codes) {
    require_size("bytes", bytes);
    all.push_back({begin, bytes});
  }
  return all;
}

std::vector<PackedWeight> packed_weights(const std::vector<PackedCode>& codes,
                                         const std::vector<MemoryCode>& given) {
  std::vector<PackedWeight> all;
  for (const auto& [index, dtype, shape, strides, sample] : codes) {
    require(index < given.size(), "a packed weight must be one of the memories given");
    all.push_back({index,
                   std::get<0>(given[index]),
                   checked_dtype(dtype),
                   {shape.begin(), shape.end()},
                   {strides.begin(), strides.end()},
                   sample});
  }
  return all;
}

// A recording as Python's `with` knows it; it may be paused, and holds what was written down.
class PyRecording {
 public:
  void enter() { active_ = std::make_unique<Recording>(); }

  void exit() {
    require(active_ != nullptr, "a recording must be entered before it is left");
    steps_.insert(steps_.end(), active_->steps.begin(), active_->steps.end());
    active_.reset();
  }

  Program program(const std::vector<MemoryCode>& given, const std::vector<MemoryCode>& own,
                  const std::vector<MemoryCode>& fixed, const std::vector<PackedCode>& packed) {
    return Program(steps_, memories(given), memories(own), memories(fixed),
                   packed_weights(packed, given));
  }

 private:
  std::unique_ptr<Recording> active_;
  std::vector<Step> steps_;
};

void copy_py(Address from, int from_dtype, const std::array<int64_t, 4>& from_strides, Address to,
             int to_dtype, const std::array<int64_t, 4>& to_strides,
             const std::array<int64_t, 4>& shape) {
  CopyArgs args{at(from), at(to), checked_dtype(from_dtype), checked_dtype(to_dtype), {}, {}, {}};
  for (const DType dtype : {args.from_dtype, args.to_dtype}) {
    require(dtype != DType::kFloat16, "dtypes must be float32, bfloat16 or float64");
  }
  for (size_t i = 0; i < 4; ++i) {
    require_size("shape", shape[i]);
    args.shape[i] = shape[i];
    args.from_strides[i] = from_strides[i];
    args.to_strides[i] = to_strides[i];
  }
  perform(args);
}

}  // namespace

void define_program(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Program>(m, "Program", "Kernel calls that run on memory that each run is given.")
      .def("run", &Program::run, Unlocked(), py::arg("given"), py::arg("threads"),
           "Whether it ran: not where the instruction set or a packed weight has changed.")
      .def_property_readonly("steps", &Program::steps, "How many kernels it calls.")
      .def_property_readonly("scratch_bytes", &Program::scratch_bytes,
                             "Memory that lives for one run.");
  py::class_<PyRecording>(m, "Recording", "While entered, kernels are written down, not run.")
      .def(py::init<>())
      .def("enter", &PyRecording::enter)
      .def("exit", &PyRecording::exit)
      .def("program", &PyRecording::program, py::arg("given"), py::arg("own"), py::arg("fixed"),
           py::arg("packed"), "What was written down, as a program.");
  m.def("copy", &copy_py, py::arg("from_"), py::arg("from_dtype"), py::arg("from_strides"),
        py::arg("to"), py::arg("to_dtype"), py::arg("to_strides"), py::arg("shape"),
        "Copies between strides of four axes, and between float32, bfloat16 and float64.");
}

}  // namespace fastres::cpu
