// fastres._cpu: the CPU kernels on raw addresses. Tensors are checked by the Python adapter; here
// only what would be an undefined code or a null pointer dereference is refused.
#include <array>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <pybind11/stl.h>

#ifdef __unix__
#include <dlfcn.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "bindings/checks.h"
#include "bindings/cpu_program.h"
#include "bindings/running.h"
#include "cpu/allocator.h"
#include "cpu/geometry.h"
#include "cpu/kernels.h"
#include "cpu/program.h"
#include "fastres/dlpack.h"

namespace fastres::cpu {
namespace {

// Whether a dictionary has the keys of its copy in their order, and the very same values.
bool same_items(PyObject* dict, PyObject* copy) {
  if (!PyDict_Check(dict) || !PyDict_Check(copy) || PyDict_Size(dict) != PyDict_Size(copy)) {
    return false;
  }
  PyObject *key = nullptr, *value = nullptr, *other_key = nullptr, *other = nullptr;
  Py_ssize_t at = 0, other_at = 0;
  while (PyDict_Next(dict, &at, &key, &value) && PyDict_Next(copy, &other_at, &other_key, &other)) {
    const bool same_key = key == other_key || PyObject_RichCompareBool(key, other_key, Py_EQ) == 1;
    if (value != other || !same_key) {
      return false;
    }
  }
  return true;
}

bool same_items_py(const py::list& dicts, const py::list& copies) {
  bool same = dicts.size() == copies.size();
  for (size_t i = 0; same && i < dicts.size(); ++i) {
    same = same_items(PyList_GET_ITEM(dicts.ptr(), i), PyList_GET_ITEM(copies.ptr(), i));
  }
  return same;
}

Problem checked_problem(int64_t n, int64_t c, int64_t hw, int layout, int dtype, int threads) {
  require(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
  return {checked_shape(n, c, hw, layout, dtype), threads};
}

// ---- kernels ----

void channel_stats_py(Address y, Address state, int64_t prior_count, int64_t n, int64_t c,
                      int64_t hw, int layout, int dtype, int threads) {
  const Problem problem = checked_problem(n, c, hw, layout, dtype, threads);
  require_size("prior_count", prior_count);
  require_data("y", y, problem);
  if (c > 0) {
    require_address("state", state);
  }
  perform(ChannelStatsArgs{at(y), static_cast<double*>(at(state)), prior_count, problem});
}

void finalize_stats_py(Address state, int64_t count, Address running_mean, Address running_var,
                       Address weight, Address bias, double eps, Address stats, int64_t c,
                       int dtype) {
  require_size("c", c);
  require_size("count", count);
  const DType type = checked_dtype(dtype);
  if (c > 0) {
    require_address("stats", stats);
    if (!state) {
      require_address("running_mean", running_mean);
      require_address("running_var", running_var);
    }
  }
  perform(FinalizeStatsArgs{static_cast<const double*>(at(state)), count, at(running_mean),
                            at(running_var), at(weight), at(bias), eps, at(stats), c, type});
}

void scale_shift_act_py(Address y, Address scale, Address shift, Address residual,
                        Address residual_scale, Address residual_shift, Address out, Address mask,
                        int act, int64_t n, int64_t c, int64_t hw, int layout, int dtype,
                        int threads) {
  const Problem problem = checked_problem(n, c, hw, layout, dtype, threads);
  const Activation activation = checked_act(act);
  require_data("y", y, problem);
  require_data("scale", scale, problem);
  require_data("shift", shift, problem);
  require_data("out", out, problem);
  require(!residual_scale == !residual_shift,
          "residual_scale and residual_shift must be given together");
  if (residual_scale) {
    require_data("residual", residual, problem);
  }
  perform(ScaleShiftActArgs{at(y), at(scale), at(shift), at(residual), at(residual_scale),
                            at(residual_shift), at(out), static_cast<uint8_t*>(at(mask)),
                            activation, problem});
}

void bn_act_backward_reduce_py(Address grad_out, int gate, Address gate_ptr, Address y1,
                               Address stats1, Address y2, Address stats2, Address sums,
                               bool accumulate, int64_t n, int64_t c, int64_t hw, int layout,
                               int dtype, int threads, int act) {
  const Problem problem = checked_problem(n, c, hw, layout, dtype, threads);
  const Gate gate_code = checked_gate(gate);
  require_data("grad_out", grad_out, problem);
  require_gate_source(gate_code, gate_ptr, y1, stats1, problem);
  require(y1 || !y2, "y1 must be a non-null address where y2 is one, got 0");
  if (y1) {
    require_address("stats1", stats1);
  }
  if (y2) {
    require_address("stats2", stats2);
  }
  if (c > 0) {
    require_address("sums", sums);
  }
  perform(BackwardReduceArgs{at(grad_out),
                             gate_code,
                             checked_act(act),
                             at(gate_ptr),
                             {at(y1), at(y2)},
                             {at(stats1), at(stats2)},
                             static_cast<double*>(at(sums)),
                             accumulate,
                             problem});
}

void bn_act_backward_apply_py(Address grad_out, int gate, Address gate_ptr, Address y1,
                              Address stats1, Address y2, Address stats2, Address sums,
                              int64_t count, Address grad_y1, Address grad_y2,
                              Address grad_residual, int64_t n, int64_t c, int64_t hw, int layout,
                              int dtype, int threads, int act) {
  const Problem problem = checked_problem(n, c, hw, layout, dtype, threads);
  const Gate gate_code = checked_gate(gate);
  require_size("count", count);
  require_data("grad_out", grad_out, problem);
  require_gate_source(gate_code, gate_ptr, y1, stats1, problem);
  const Address y[2] = {y1, y2}, stats[2] = {stats1, stats2}, grad_y[2] = {grad_y1, grad_y2};
  for (int b = 0; b < 2; ++b) {
    const std::string branch = std::to_string(b + 1);
    if (grad_y[b]) {
      require_address(("stats" + branch).c_str(), stats[b]);
      if (count > 0) {
        require_data(("y" + branch).c_str(), y[b], problem);
        require_address("sums", sums);
      }
    }
  }
  perform(BackwardApplyArgs{at(grad_out),
                            gate_code,
                            checked_act(act),
                            at(gate_ptr),
                            {at(y1), at(y2)},
                            {at(stats1), at(stats2)},
                            static_cast<const double*>(at(sums)),
                            count,
                            {at(grad_y1), at(grad_y2)},
                            at(grad_residual),
                            problem});
}

void add_act_py(Address x, Address r, Address out, Address mask, int act, int64_t n, int64_t c,
                int64_t hw, int layout, int dtype, int threads) {
  const Problem problem = checked_problem(n, c, hw, layout, dtype, threads);
  const Activation activation = checked_act(act);
  require_data("x", x, problem);
  require_data("r", r, problem);
  require_data("out", out, problem);
  perform(AddActArgs{at(x), at(r), at(out), static_cast<uint8_t*>(at(mask)), activation, problem});
}

void act_backward_py(Address grad_out, int gate, Address gate_ptr, Address grad, int64_t n,
                     int64_t c, int64_t hw, int layout, int dtype, int threads, int act) {
  const Problem problem = checked_problem(n, c, hw, layout, dtype, threads);
  const Gate gate_code = checked_gate(gate);
  require(gate_code != Gate::kAffine, "gate must be 0, 1 or 3, got 2");
  require_data("grad_out", grad_out, problem);
  require_data("grad", grad, problem);
  require_gate_source(gate_code, gate_ptr, 0, 0, problem);
  perform(
      ActBackwardArgs{at(grad_out), gate_code, checked_act(act), at(gate_ptr), at(grad), problem});
}

// ---- convolutions ----

// n, h, w, c, k, kh, kw, stride, padding and dilation per axis, dtype.
using ShapeCode = std::array<int64_t, 14>;

DType checked_conv_dtype(int64_t code) {
  require(code == int(DType::kFloat32) || code == int(DType::kBFloat16),
          "dtype must be float32 or bfloat16, got code " + std::to_string(code));
  return DType(code);
}

ConvShape checked_conv(const ShapeCode& s) {
  const ConvShape shape{s[0], s[1], s[2], s[3],  s[4],  s[5],  s[6],
                        s[7], s[8], s[9], s[10], s[11], s[12], checked_conv_dtype(s[13])};
  for (int i = 0; i < 5; ++i) {
    require_size("shape", s[size_t(i)]);
  }
  require(shape.kh > 0 && shape.kw > 0 && shape.sh > 0 && shape.sw > 0 && shape.dh > 0 &&
              shape.dw > 0 && shape.ph >= 0 && shape.pw >= 0,
          "kernel, stride and dilation must be positive, and padding must not be negative");
  require(shape.h + 2 * shape.ph > shape.dh * (shape.kh - 1) &&
              shape.w + 2 * shape.pw > shape.dw * (shape.kw - 1),
          "the kernel must not be larger than the padded input");
  return shape;
}

int checked_threads(int threads) {
  require(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
  return threads;
}

bool is_empty(const ConvShape& s) { return s.n * s.c * s.k * s.out_h() * s.out_w() == 0; }

const float* floats(Address address) { return static_cast<const float*>(at(address)); }

int64_t packed_size_py(const ShapeCode& shape, bool transposed) {
  const ConvShape conv = checked_conv(shape);
  return active_table().convolutions(conv).packed_size(conv, transposed);
}

bool packs_ahead_py(const ShapeCode& shape, bool transposed) {
  const ConvShape conv = checked_conv(shape);
  return active_table().convolutions(conv).packs_ahead(conv, transposed);
}

std::vector<int64_t> shares_py(const ShapeCode& code, const std::string& pass, bool winograd,
                               int team) {
  const ConvShape shape = checked_conv(code);
  require(pass == "forward" || pass == "data" || pass == "weight", "unknown pass " + pass);
  require(team > 0, "team must be positive");
  require(!winograd || is_winograd(shape), "no squares for this shape");
  std::vector<int64_t> shares(static_cast<size_t>(team));
  active_table().convolutions(shape).shares({shape,
                                             pass == "forward" ? Pass::kForward
                                             : pass == "data"  ? Pass::kDataGradient
                                                               : Pass::kWeightGradient,
                                             winograd, team, shares.data()});
  return shares;
}

// Address and strides of a weight [k, c, kh, kw].
using WeightCode = std::tuple<Address, std::array<int64_t, 4>>;

ConvWeight checked_weight(const WeightCode& code) {
  const auto& [weight, strides] = code;
  require_address("weight", weight);
  return {at(weight), strides[0], strides[1], strides[2], strides[3]};
}

bool checked_winograd(bool winograd, const ConvShape& shape, Address packed) {
  const bool able = is_winograd(shape) && shape.dtype == DType::kFloat32;
  require(!winograd || (able && packed),
          "winograd must be false but for three by three taps in steps of one, packed for it, of "
          "float32");
  return winograd;
}

int64_t winograd_size_py(const ShapeCode& code, bool transposed) {
  const ConvShape shape = checked_conv(code);
  checked_winograd(true, shape, 1);
  return active_table().winograd_size(shape, transposed);
}

void pack_weight_py(const WeightCode& weight, bool transposed, Address packed,
                    const ShapeCode& code, int threads, bool winograd) {
  const ConvShape shape = checked_conv(code);
  require_address("packed", packed);
  perform(PackWeightArgs{checked_weight(weight), transposed, at(packed), shape,
                         checked_threads(threads), checked_winograd(winograd, shape, packed)});
}

int64_t sample_weight_py(Address weight, const std::array<int64_t, 4>& shape,
                         const std::array<int64_t, 4>& strides, int dtype) {
  require_address("weight", weight);
  return sample_weight(at(weight), checked_conv_dtype(dtype), shape.data(), strides.data());
}

ConvInput checked_input(Address x, Address scale, Address shift, int act) {
  require_address("x", x);
  require(!scale == !shift, "scale and shift must be given together");
  return {at(x), floats(scale), floats(shift), checked_act(act)};
}

void conv_forward_py(Address x, Address scale, Address shift, int act, const WeightCode& weight,
                     Address packed, Address bias, Address y, Address state, Address out_scale,
                     Address out_shift, Address residual, int out_act, const ShapeCode& code,
                     int threads, bool winograd) {
  const ConvShape shape = checked_conv(code);
  require(!is_empty(shape), "shape must not be empty");
  require_address("y", y);
  require(!out_scale == !out_shift, "out_scale and out_shift must be given together");
  perform(ConvForwardArgs{checked_input(x, scale, shift, act), checked_weight(weight), at(packed),
                          checked_winograd(winograd, shape, packed), at(bias), at(y),
                          static_cast<double*>(at(state)), floats(out_scale), floats(out_shift),
                          at(residual), checked_act(out_act), shape, checked_threads(threads)});
}

// How grad_y is formed: grad_out, gate, its activation and source, y, stats, sums, count.
using GradientCode = std::tuple<Address, int, int, Address, Address, Address, Address, int64_t>;

BackwardApplyArgs checked_gradient(const GradientCode& code, const ConvShape& s, int threads) {
  const auto& [grad_out, gate, act, gate_ptr, y, stats, sums, count] = code;
  const Problem problem{{s.n, s.k, s.out_h() * s.out_w(), Layout::kChannelsLast, s.dtype}, threads};
  const Gate gate_code = checked_gate(gate);
  require_size("count", count);
  require_address("grad_out", grad_out);
  if (stats) {
    require_gate_source(gate_code, gate_ptr, y, stats, problem);
    require(count == 0 || (y && sums), "y and sums must be given where count is not 0");
  }
  return {at(grad_out),
          gate_code,
          checked_act(act),
          at(gate_ptr),
          {at(y), nullptr},
          {at(stats), nullptr},
          static_cast<const double*>(at(sums)),
          count,
          {nullptr, nullptr},
          nullptr,
          problem};
}

// What a gate is told of: gate, its activation, its source.
using GateCode = std::tuple<int, int, Address>;

void conv_backward_data_py(const GradientCode& grad, const WeightCode& weight, Address packed,
                           Address grad_x, bool accumulate, Address residual,
                           const GateCode& residual_gate, Address sums, const GateCode& reduce_gate,
                           Address y, Address stats, const ShapeCode& code, int threads,
                           bool winograd) {
  const ConvShape shape = checked_conv(code);
  require(!is_empty(shape), "shape must not be empty");
  require_address("grad_x", grad_x);
  const Problem problem{{shape.n, shape.c, shape.h * shape.w, Layout::kChannelsLast, shape.dtype},
                        checked_threads(threads)};
  ConvDataArgs args{checked_gradient(grad, shape, threads),
                    checked_weight(weight),
                    at(packed),
                    checked_winograd(winograd, shape, packed),
                    at(grad_x),
                    accumulate,
                    {},
                    {},
                    shape,
                    threads};
  if (residual) {
    const auto& [gate, act, source] = residual_gate;
    require(checked_gate(gate) != Gate::kAffine, "gate must be 0, 1 or 3, got 2");
    require_gate_source(Gate(gate), source, 0, 0, problem);
    args.residual = {at(residual), Gate(gate), checked_act(act), at(source), nullptr, problem};
  }
  if (sums) {
    const auto& [gate, act, source] = reduce_gate;
    require_gate_source(checked_gate(gate), source, y, stats, problem);
    require_address("y", y);
    require_address("stats", stats);
    args.reduce = {at(grad_x),
                   Gate(gate),
                   checked_act(act),
                   at(source),
                   {at(y), nullptr},
                   {at(stats), nullptr},
                   static_cast<double*>(at(sums)),
                   false,
                   problem};
  }
  perform(args);
}

void conv_backward_weight_py(const GradientCode& grad, Address x, Address scale, Address shift,
                             int act, Address grad_weight, const ShapeCode& code, int threads,
                             bool winograd) {
  const ConvShape shape = checked_conv(code);
  require(!is_empty(shape), "shape must not be empty");
  require_address("grad_weight", grad_weight);
  perform(ConvWeightArgs{checked_gradient(grad, shape, checked_threads(threads)),
                         checked_input(x, scale, shift, act), at(grad_weight), shape, threads,
                         checked_winograd(winograd, shape, 1)});
}

void update_running_py(const std::vector<UpdateCode>& updates) {
  for (const RunningUpdate& update : checked_updates(updates)) {
    perform(update);
  }
}

// ---- instruction sets ----

std::vector<std::string> isas() {
  int count;
  const KernelTable* const* tables = built_tables(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    if (tables[i]->supported()) {
      names.push_back(tables[i]->name);
    }
  }
  return names;
}

void set_isa(const std::string& name) {
  if (select_table(name.c_str())) {
    return;
  }
  std::string known;
  for (const std::string& isa : isas()) {
    known += (known.empty() ? "" : ", ") + isa;
  }
  throw py::value_error("isa must be one that was built and that this CPU runs (" + known +
                        "), got " + name);
}

py::dict openmp() {
  py::dict info;
#ifdef _OPENMP
  info["version"] = _OPENMP;
  Dl_info where{};
  const bool found = dladdr(reinterpret_cast<void*>(&omp_get_num_threads), &where) != 0;
  info["library"] = found && where.dli_fname ? py::object(py::str(where.dli_fname)) : py::none();
#else
  info["version"] = 0;
  info["library"] = py::none();
#endif
  return info;
}

// ---- allocator ----

// One allocation holds what a capsule refers to.
struct TensorHandle {
  DLManagedTensor managed;
  std::vector<int64_t> shape, strides;
  Block* block;
};

void free_tensor(DLManagedTensor* managed) {
  TensorHandle* handle = static_cast<TensorHandle*>(managed->manager_ctx);
  release(handle->block);
  delete handle;
}

// Only an unconsumed capsule still bears its first name.
void free_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor")) {
    free_tensor(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
  }
}

DLDataType dlpack_type(int code) {
  static constexpr DLDataType kTypes[] = {
      {kDLFloat, 32, 1}, {kDLBFloat, 16, 1}, {kDLFloat, 16, 1}, {kDLFloat, 64, 1}, {kDLUInt, 8, 1}};
  return kTypes[checked_code("dtype_code", code, 5)];
}

// Bytes from the first element to the last, or nothing where one of the sizes is zero.
size_t span_bytes(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                  int64_t itemsize) {
  int64_t last = 0;
  for (size_t i = 0; i < shape.size(); ++i) {
    require_size("shape", shape[i]);
    require_size("strides", strides[i]);
    if (shape[i] == 0) {
      return 0;
    }
    int64_t reach;
    if (__builtin_mul_overflow(shape[i] - 1, strides[i], &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      throw std::bad_alloc();
    }
  }
  int64_t bytes;
  if (__builtin_add_overflow(last, 1, &last) || __builtin_mul_overflow(last, itemsize, &bytes)) {
    throw std::bad_alloc();
  }
  return size_t(bytes);
}

py::object empty(std::vector<int64_t> shape, std::vector<int64_t> strides, int dtype_code) {
  require(shape.size() == strides.size(), "strides must have as many entries as shape");
  const DLDataType type = dlpack_type(dtype_code);
  const size_t bytes = span_bytes(shape, strides, type.bits / 8);
  Block* block;
  {
    py::gil_scoped_release unlocked;  // mapping or poisoning a large block takes a while
    block = allocate_or_throw(bytes);
  }
  TensorHandle* handle = new TensorHandle{{}, std::move(shape), std::move(strides), block};
  handle->managed.dl_tensor = {address(block),
                               {kDLCPU, 0},
                               int32_t(handle->shape.size()),
                               type,
                               handle->shape.data(),
                               handle->strides.data(),
                               0};
  handle->managed.manager_ctx = handle;
  handle->managed.deleter = free_tensor;
  PyObject* capsule = PyCapsule_New(&handle->managed, "dltensor", free_capsule);
  if (!capsule) {
    free_tensor(&handle->managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}

py::dict memory_stats_py() {
  const MemoryStats s = memory_stats();
  py::dict stats;
  stats["live"] = s.live;
  stats["cached"] = s.cached;
  stats["peak_live"] = s.peak_live;
  stats["hits"] = s.hits;
  stats["misses"] = s.misses;
  return stats;
}

void set_cache_limit_py(int64_t bytes) {
  require_size("bytes", bytes);
  set_cache_limit(size_t(bytes));
}

using Unlocked = py::call_guard<py::gil_scoped_release>;

void define_kernels(py::module_& m) {
  m.def("channel_stats", &channel_stats_py, Unlocked(), py::arg("y"), py::arg("state"),
        py::arg("prior_count"), py::arg("n"), py::arg("c"), py::arg("hw"), py::arg("layout"),
        py::arg("dtype"), py::arg("threads"),
        "Per-channel mean and sum of squared deviations of y, merged into state [2, C] float64.");
  m.def("finalize_stats", &finalize_stats_py, Unlocked(), py::arg("state"), py::arg("count"),
        py::arg("running_mean"), py::arg("running_var"), py::arg("weight"), py::arg("bias"),
        py::arg("eps"), py::arg("stats"), py::arg("c"), py::arg("dtype"),
        "Fills stats [5, C]: mean, var (biased), invstd, scale, shift.");
  m.def("scale_shift_act", &scale_shift_act_py, Unlocked(), py::arg("y"), py::arg("scale"),
        py::arg("shift"), py::arg("residual"), py::arg("residual_scale"), py::arg("residual_shift"),
        py::arg("out"), py::arg("mask"), py::arg("act"), py::arg("n"), py::arg("c"), py::arg("hw"),
        py::arg("layout"), py::arg("dtype"), py::arg("threads"),
        "out = act(scale * y + shift [+ residual | + residual_scale * residual + residual_shift])");
  m.def("bn_act_backward_reduce", &bn_act_backward_reduce_py, Unlocked(), py::arg("grad_out"),
        py::arg("gate"), py::arg("gate_ptr"), py::arg("y1"), py::arg("stats1"), py::arg("y2"),
        py::arg("stats2"), py::arg("sums"), py::arg("accumulate"), py::arg("n"), py::arg("c"),
        py::arg("hw"), py::arg("layout"), py::arg("dtype"), py::arg("threads"),
        py::arg("act") = int(Activation::kRelu),
        "Fills sums [3, C] float64: sum_g, and sum_gx of one or both branches.");
  m.def("bn_act_backward_apply", &bn_act_backward_apply_py, Unlocked(), py::arg("grad_out"),
        py::arg("gate"), py::arg("gate_ptr"), py::arg("y1"), py::arg("stats1"), py::arg("y2"),
        py::arg("stats2"), py::arg("sums"), py::arg("count"), py::arg("grad_y1"),
        py::arg("grad_y2"), py::arg("grad_residual"), py::arg("n"), py::arg("c"), py::arg("hw"),
        py::arg("layout"), py::arg("dtype"), py::arg("threads"),
        py::arg("act") = int(Activation::kRelu),
        "grad_y = A * g + B * y + C for one or both branches, grad_residual = g.");
  m.def("add_act", &add_act_py, Unlocked(), py::arg("x"), py::arg("r"), py::arg("out"),
        py::arg("mask"), py::arg("act"), py::arg("n"), py::arg("c"), py::arg("hw"),
        py::arg("layout"), py::arg("dtype"), py::arg("threads"), "out = act(x + r)");
  m.def("act_backward", &act_backward_py, Unlocked(), py::arg("grad_out"), py::arg("gate"),
        py::arg("gate_ptr"), py::arg("grad"), py::arg("n"), py::arg("c"), py::arg("hw"),
        py::arg("layout"), py::arg("dtype"), py::arg("threads"),
        py::arg("act") = int(Activation::kRelu),
        "grad = grad_out where the activation's gate is open, 0 elsewhere.");
  // It takes less time than giving up Python's lock for it.
  m.def("update_running", &update_running_py, py::arg("updates"),
        "running = (1 - momentum) * running + momentum * batch, and the counters, in order.");
}

void define_convolutions(py::module_& m) {
  m.def("packed_size", &packed_size_py, py::arg("shape"), py::arg("transposed"),
        "Steps of a packed weight, of four bytes.");
  m.def("packs_ahead", &packs_ahead_py, py::arg("shape"), py::arg("transposed"),
        "Whether a weight is used often enough to be packed as a whole.");
  m.def(
      "shares", &shares_py, py::arg("shape"), py::arg("pass"), py::arg("winograd"), py::arg("team"),
      "What each of a team's threads has to do in the forward, data or weight pass, as numbers to "
      "be compared.");
  m.def("pack_weight", &pack_weight_py, Unlocked(), py::arg("weight"), py::arg("transposed"),
        py::arg("packed"), py::arg("shape"), py::arg("threads"), py::arg("winograd") = false,
        "Reorders a weight [k, c, kh, kw] for a convolution, or for its data gradient; with "
        "winograd it is transformed for calls with that flag.");
  m.def("winograd_size", &winograd_size_py, py::arg("shape"), py::arg("transposed"),
        "Floats of a weight transformed for Winograd's convolution.");
  m.def("same_items", &same_items_py, py::arg("dicts"), py::arg("copies"),
        "Whether each dictionary has the keys of its copy, in their order, and the same values.");
  m.def("sample_weight", &sample_weight_py, py::arg("weight"), py::arg("shape"), py::arg("strides"),
        py::arg("dtype"), "A number that changes when an output channel's sample does.");
  m.def("conv_forward", &conv_forward_py, Unlocked(), py::arg("x"), py::arg("scale"),
        py::arg("shift"), py::arg("act"), py::arg("weight"), py::arg("packed"), py::arg("bias"),
        py::arg("y"), py::arg("state"), py::arg("out_scale"), py::arg("out_shift"),
        py::arg("residual"), py::arg("out_act"), py::arg("shape"), py::arg("threads"),
        py::arg("winograd") = false,
        "y = conv(act(scale * x + shift)) + bias, and the state of y; or "
        "y = out_act(out_scale * conv + out_shift [+ residual]).");
  m.def("conv_backward_data", &conv_backward_data_py, Unlocked(), py::arg("grad"),
        py::arg("weight"), py::arg("packed"), py::arg("grad_x"), py::arg("accumulate"),
        py::arg("residual"), py::arg("residual_gate"), py::arg("sums"), py::arg("reduce_gate"),
        py::arg("y"), py::arg("stats"), py::arg("shape"), py::arg("threads"),
        py::arg("winograd") = false,
        "grad_x (+)= the data gradient of a grad_y that is formed on the way, and sums [2, c] of "
        "what passes the gate in front.");
  m.def("conv_backward_weight", &conv_backward_weight_py, Unlocked(), py::arg("grad"), py::arg("x"),
        py::arg("scale"), py::arg("shift"), py::arg("act"), py::arg("grad_weight"),
        py::arg("shape"), py::arg("threads"), py::arg("winograd") = false,
        "grad_weight [k, kh, kw, c].");
}

void define_runtime(py::module_& m) {
  m.def(
      "isa", [] { return std::string(active_table().name); },
      "The instruction set whose kernels run.");
  m.def("isas", &isas, "Instruction sets that were built and that this CPU runs, best first.");
  m.def("set_isa", &set_isa, py::arg("name"), "Choose the instruction set.");
  m.def("openmp", &openmp, "OpenMP version, and the library its calls resolved to.");
  m.def("empty", &empty, py::arg("shape"), py::arg("strides"), py::arg("dtype_code"),
        "Uninitialised memory from the caching allocator, as a DLPack capsule.");
  m.def("memory_stats", &memory_stats_py, "Bytes live, cached and at peak; cache hits and misses.");
  m.def("trim", &trim_cache, Unlocked(), "Give all free blocks back to the system.");
  m.def("set_cache_limit", &set_cache_limit_py, Unlocked(), py::arg("bytes"),
        "Upper bound of the bytes kept in free blocks.");
  m.def("set_poison", &set_poison, py::arg("on"), "Fill every allocation with 0xff bytes (NaN).");
}

}  // namespace
}  // namespace fastres::cpu

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fastres, on raw addresses.";
  // The allocator is made now: a process that forks while another thread makes it on first use
  // would leave the child waiting for that thread.
  fastres::cpu::memory_stats();
  fastres::cpu::define_kernels(m);
  fastres::cpu::define_convolutions(m);
  fastres::cpu::define_runtime(m);
  fastres::cpu::define_program(m);
  if (const char* isa = std::getenv("FASTRES_CPU_ISA")) {
    if (*isa) {
      try {
        fastres::cpu::set_isa(isa);
      } catch (const fastres::py::value_error& error) {
        throw fastres::py::import_error(std::string("FASTRES_CPU_ISA: ") + error.what());
      }
    }
  }
}
