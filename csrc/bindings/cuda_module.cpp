// fastres._cuda: the CUDA kernels on raw addresses. Tensors are checked by the Python adapter; here
// only what would be an undefined code or a null pointer dereference is refused.
//
// `shape` is (n, c, hw, layout, dtype), `tiling` (threads, width, chunk_rows, stages), `where`
// (device, stream); see csrc/cuda/kernels.h.
#include "bindings/checks.h"
#include "bindings/running.h"
#include "cuda/kernels.h"

namespace fastres::cuda {
namespace {

using ShapeCode = std::tuple<int64_t, int64_t, int64_t, int, int>;
using TilingCode = std::tuple<int, int, int64_t, int>;
using WhereCode = std::tuple<int, Address>;

Activations shape_of(const ShapeCode& code) {
  const Activations shape = std::apply(checked_shape, code);
  require(shape.numel() > 0, "shape must hold at least one element");
  return shape;
}

Tiling tiling_of(const TilingCode& code) {
  return {std::get<0>(code), std::get<1>(code), std::get<2>(code), std::get<3>(code)};
}

Where where_of(const WhereCode& code) { return {std::get<0>(code), at(std::get<1>(code))}; }

float* floats(Address address) { return static_cast<float*>(at(address)); }

// One branch or two: (y, stats) each.
struct Branches {
  Address y[2], stats[2];

  void check(const Activations& shape) const {
    require(y[0] || !y[1], "y1 must be a non-null address where y2 is one, got 0");
    for (int b = 0; b < 2; ++b) {
      if (y[b]) {
        require_address(b ? "stats2" : "stats1", stats[b]);
        require_data(b ? "y2" : "y1", y[b], shape);
      }
    }
  }
};

ChannelStatsArgs stats_args(Address y, Address partials, Address prior, int64_t prior_count,
                            Address state, const Affine& affine, Address stats,
                            const Activations& shape, const Tiling& tiling) {
  require_size("prior_count", prior_count);
  require_address("y", y);
  require_address("partials", partials);
  require(state || stats, "one of state and stats must be a non-null address, got 0");
  return {at(y),         static_cast<double*>(at(partials)),
          floats(prior), prior_count,
          floats(state), affine,
          floats(stats), shape,
          tiling};
}

ScaleShiftActArgs normalise_args(Address y, Address stats, Address residual, Address residual_stats,
                                 Address out, Address mask, int act, const Activations& shape,
                                 const Tiling& tiling) {
  require_address("y", y);
  require_address("out", out);
  if (residual_stats) {
    require_address("residual", residual);
  }
  return {at(y),
          floats(stats),
          at(residual),
          floats(residual_stats),
          at(out),
          static_cast<uint8_t*>(at(mask)),
          checked_act(act),
          shape,
          tiling};
}

BackwardReduceArgs reduce_args(Address grad_out, int gate, int act, Address gate_ptr,
                               const Branches& b, Address partials, Address prior, Address sums,
                               const Activations& shape, const Tiling& tiling) {
  const Gate kind = checked_gate(gate);
  require_address("grad_out", grad_out);
  require_address("y1", b.y[0]);
  require_gate_source(kind, gate_ptr, b.y[0], b.stats[0], shape);
  b.check(shape);
  require_address("partials", partials);
  require_address("sums", sums);
  return {at(grad_out),
          kind,
          checked_act(act),
          at(gate_ptr),
          {at(b.y[0]), at(b.y[1])},
          {floats(b.stats[0]), floats(b.stats[1])},
          floats(partials),
          floats(prior),
          floats(sums),
          shape,
          tiling};
}

BackwardApplyArgs apply_args(Address grad_out, int gate, int act, Address gate_ptr,
                             const Branches& b, Address sums, int64_t count, Address grad_y1,
                             Address grad_y2, Address grad_residual, const Activations& shape,
                             const Tiling& tiling) {
  const Gate kind = checked_gate(gate);
  const Address grads[] = {grad_y1, grad_y2};
  require_size("count", count);
  require_address("grad_out", grad_out);
  require_gate_source(kind, gate_ptr, b.y[0], b.stats[0], shape);
  for (int i = 0; i < 2; ++i) {
    if (grads[i]) {
      require_address(i ? "stats2" : "stats1", b.stats[i]);
      if (sums) {
        require_address(i ? "y2" : "y1", b.y[i]);
      }
    }
  }
  return {at(grad_out),
          kind,
          checked_act(act),
          at(gate_ptr),
          {at(b.y[0]), at(b.y[1])},
          {floats(b.stats[0]), floats(b.stats[1])},
          floats(sums),
          count,
          {at(grad_y1), at(grad_y2)},
          at(grad_residual),
          shape,
          tiling};
}

// ---- kernels ----

void channel_stats_py(Address y, Address partials, Address prior, int64_t prior_count,
                      Address state, Address weight, Address bias, double eps, Address stats,
                      const ShapeCode& shape, const TilingCode& tiling, const WhereCode& where) {
  const Affine affine{floats(weight), floats(bias), eps};
  channel_stats(stats_args(y, partials, prior, prior_count, state, affine, stats, shape_of(shape),
                           tiling_of(tiling)),
                where_of(where));
}

void finalize_stats_py(Address state, int64_t count, Address running_mean, Address running_var,
                       Address weight, Address bias, double eps, Address stats, int64_t channels,
                       const WhereCode& where) {
  require_size("count", count);
  require(channels > 0, "channels must be positive, got " + std::to_string(channels));
  require_address("stats", stats);
  if (!state) {
    require_address("running_mean", running_mean);
    require_address("running_var", running_var);
  }
  finalize_stats({floats(state),
                  count,
                  floats(running_mean),
                  floats(running_var),
                  {floats(weight), floats(bias), eps},
                  floats(stats),
                  channels},
                 where_of(where));
}

void scale_shift_act_py(Address y, Address stats, Address residual, Address residual_stats,
                        Address out, Address mask, int act, const ShapeCode& shape,
                        const TilingCode& tiling, const WhereCode& where) {
  scale_shift_act(normalise_args(y, stats, residual, residual_stats, out, mask, act,
                                 shape_of(shape), tiling_of(tiling)),
                  where_of(where));
}

void backward_reduce_py(Address grad_out, int gate, int act, Address gate_ptr, Address y1,
                        Address stats1, Address y2, Address stats2, Address partials, Address prior,
                        Address sums, const ShapeCode& shape, const TilingCode& tiling,
                        const WhereCode& where) {
  backward_reduce(reduce_args(grad_out, gate, act, gate_ptr, {{y1, y2}, {stats1, stats2}}, partials,
                              prior, sums, shape_of(shape), tiling_of(tiling)),
                  where_of(where));
}

void backward_apply_py(Address grad_out, int gate, int act, Address gate_ptr, Address y1,
                       Address stats1, Address y2, Address stats2, Address sums, int64_t count,
                       Address grad_y1, Address grad_y2, Address grad_residual,
                       const ShapeCode& shape, const TilingCode& tiling, const WhereCode& where) {
  backward_apply(
      apply_args(grad_out, gate, act, gate_ptr, {{y1, y2}, {stats1, stats2}}, sums, count, grad_y1,
                 grad_y2, grad_residual, shape_of(shape), tiling_of(tiling)),
      where_of(where));
}

void norm_forward_py(Address y, Address partials, Address weight, Address bias, double eps,
                     Address stats, Address residual, Address residual_stats, Address out,
                     Address mask, int act, const ShapeCode& shape, const TilingCode& tiling,
                     const WhereCode& where) {
  const Activations s = shape_of(shape);
  const Tiling t = tiling_of(tiling);
  require_address("stats", stats);
  const Affine affine{floats(weight), floats(bias), eps};
  norm_forward({stats_args(y, partials, 0, 0, 0, affine, stats, s, t),
                normalise_args(y, stats, residual, residual_stats, out, mask, act, s, t)},
               where_of(where));
}

void norm_backward_py(Address grad_out, int gate, int act, Address gate_ptr, Address y1,
                      Address stats1, Address y2, Address stats2, Address partials, Address sums,
                      int64_t count, Address grad_y1, Address grad_y2, Address grad_residual,
                      const ShapeCode& shape, const TilingCode& tiling, const WhereCode& where) {
  const Activations s = shape_of(shape);
  const Tiling t = tiling_of(tiling);
  const Branches b{{y1, y2}, {stats1, stats2}};
  require(!y2 == !grad_y2, "grad_y2 must be given exactly where y2 is");
  norm_backward({reduce_args(grad_out, gate, act, gate_ptr, b, partials, 0, sums, s, t),
                 apply_args(grad_out, gate, act, gate_ptr, b, count > 0 ? sums : 0, count, grad_y1,
                            grad_y2, grad_residual, s, t)},
                where_of(where));
}

void update_running_py(const std::vector<UpdateCode>& updates, const WhereCode& where) {
  const std::vector<RunningUpdate> checked = checked_updates(updates);
  update_running(checked.data(), int64_t(checked.size()), where_of(where));
}

int64_t norm_forward_blocks_py(int dtype, bool second, const WhereCode& where) {
  return norm_forward_blocks(checked_dtype(dtype), second, where_of(where));
}

int64_t norm_backward_blocks_py(int dtype, bool second, const WhereCode& where) {
  return norm_backward_blocks(checked_dtype(dtype), second, where_of(where));
}

using Unlocked = py::call_guard<py::gil_scoped_release>;

void define_kernels(py::module_& m) {
  const auto shape = py::arg("shape"), tiling = py::arg("tiling"), where = py::arg("where");
  m.def("channel_stats", &channel_stats_py, Unlocked(), py::arg("y"), py::arg("partials"),
        py::arg("prior"), py::arg("prior_count"), py::arg("state"), py::arg("weight"),
        py::arg("bias"), py::arg("eps"), py::arg("stats"), shape, tiling, where,
        "state [2, C]: per-channel mean and sum of squared deviations, joined with `prior`; and "
        "stats [5, C] of them. One of the two may be 0.");
  m.def("finalize_stats", &finalize_stats_py, Unlocked(), py::arg("state"), py::arg("count"),
        py::arg("running_mean"), py::arg("running_var"), py::arg("weight"), py::arg("bias"),
        py::arg("eps"), py::arg("stats"), py::arg("channels"), where,
        "stats [5, C]: mean, var (biased), invstd, scale, shift.");
  m.def("scale_shift_act", &scale_shift_act_py, Unlocked(), py::arg("y"), py::arg("stats"),
        py::arg("residual"), py::arg("residual_stats"), py::arg("out"), py::arg("mask"),
        py::arg("act"), shape, tiling, where,
        "out = act(scale * y + shift [+ residual, plain or scaled]); y as it is without stats.");
  m.def("bn_act_backward_reduce", &backward_reduce_py, Unlocked(), py::arg("grad_out"),
        py::arg("gate"), py::arg("act"), py::arg("gate_ptr"), py::arg("y1"), py::arg("stats1"),
        py::arg("y2"), py::arg("stats2"), py::arg("partials"), py::arg("prior"), py::arg("sums"),
        shape, tiling, where,
        "sums [3, C]: sum_g, and sum_gx of one or both branches, added to `prior`.");
  m.def("bn_act_backward_apply", &backward_apply_py, Unlocked(), py::arg("grad_out"),
        py::arg("gate"), py::arg("act"), py::arg("gate_ptr"), py::arg("y1"), py::arg("stats1"),
        py::arg("y2"), py::arg("stats2"), py::arg("sums"), py::arg("count"), py::arg("grad_y1"),
        py::arg("grad_y2"), py::arg("grad_residual"), shape, tiling, where,
        "grad_y of one or both branches; grad_residual = g.");
  m.def(
      "bn_act_forward", &norm_forward_py, Unlocked(), py::arg("y"), py::arg("partials"),
      py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("stats"), py::arg("residual"),
      py::arg("residual_stats"), py::arg("out"), py::arg("mask"), py::arg("act"), shape, tiling,
      where,
      "channel_stats, finalize_stats and scale_shift_act, one block of channels after the other.");
  m.def("bn_act_backward", &norm_backward_py, Unlocked(), py::arg("grad_out"), py::arg("gate"),
        py::arg("act"), py::arg("gate_ptr"), py::arg("y1"), py::arg("stats1"), py::arg("y2"),
        py::arg("stats2"), py::arg("partials"), py::arg("sums"), py::arg("count"),
        py::arg("grad_y1"), py::arg("grad_y2"), py::arg("grad_residual"), shape, tiling, where,
        "bn_act_backward_reduce and bn_act_backward_apply, one block of channels after the other.");
  m.def("update_running", &update_running_py, Unlocked(), py::arg("updates"), where,
        "running = (1 - momentum) * running + momentum * batch, and the counters, in order.");
  m.def("bn_act_forward_blocks", &norm_forward_blocks_py, py::arg("dtype"), py::arg("second"),
        where, "The most chunks that bn_act_forward can be given.");
  m.def("bn_act_backward_blocks", &norm_backward_blocks_py, py::arg("dtype"), py::arg("second"),
        where, "The most chunks that bn_act_backward can be given.");
}

}  // namespace
}  // namespace fastres::cuda

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastres, on raw addresses.";
  fastres::cuda::define_kernels(m);
  m.attr("emulated") = fastres::cuda::kEmulated;
  m.def(
      "archs", [] { return std::string(FASTRES_CUDA_ARCHS); },
      "GPU architectures that were compiled for, as FASTRES_CUDA_ARCHS names them.");
  m.def(
      "toolkit", [] { return std::string(FASTRES_CUDA_VERSION); },
      "Version of the CUDA toolkit that compiled the kernels.");
  m.def("driver", &fastres::cuda::driver_version,
        "The newest CUDA version the driver knows, as 1000 * major + 10 * minor; 0 without one.");
}
