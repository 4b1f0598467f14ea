// Every kernel on small problems, checked against plain loops in float64. Meant for
// ThreadSanitizer, with CUDA threads that are threads of the operating system: the results show
// that what it has seen is what the kernels do, and the problems are small, but have several
// blocks, chunks and channel blocks.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/platform.h"

namespace {

using namespace fastres;
using namespace fastres::cuda;

constexpr Where kWhere{0, nullptr};
constexpr double kEps = 1e-3;

// An activation as the kernels take it, element by element.
class Tensor {
 public:
  explicit Tensor(const Activations& shape) : shape_(shape), data_(shape.numel()) {}
  Tensor(const Activations& shape, int seed) : Tensor(shape) {
    for (int64_t i = 0; i < size(); ++i) {
      set(i, double((i * 7 + seed * 5) % 29) / 8 - 1.5);
    }
  }

  int64_t size() const { return shape_.numel(); }
  int64_t channel(int64_t i) const {
    return shape_.per_column() ? i % shape_.c : i / shape_.hw % shape_.c;
  }
  void* data() { return data_.data(); }

  double operator[](int64_t i) const {
    return half() ? to_acc(reinterpret_cast<const BFloat16*>(data_.data())[i]) : data_[i];
  }
  void set(int64_t i, double v) {
    half() ? void(reinterpret_cast<BFloat16*>(data_.data())[i] = FromAcc<BFloat16>::convert(v))
           : void(data_[i] = float(v));
  }

 private:
  bool half() const { return shape_.dtype == DType::kBFloat16; }

  Activations shape_;
  std::vector<float> data_;
};

using Row = std::vector<double>;
using Rows = std::array<Row, kStatsRows>;

class Problem {
 public:
  Problem(const Activations& shape, const Tiling& tiling)
      : s_(shape),
        t_(tiling),
        c_(shape.c),
        y_(shape, 1),
        r_(shape, 2),
        grad_(shape, 3),
        out_(shape),
        grad_y_(shape),
        grad_r_(shape),
        chunks_(chunks_of(shape, tiling)) {
    for (int64_t c = 0; c < c_; ++c) {
      weight_.push_back(float(c % 3) + 0.5f);
      bias_.push_back(float(c % 5) / 4 - 0.5f);
    }
    want_y_ = expected(y_);
    want_r_ = expected(r_);
  }

  void statistics() {
    measure(y_, want_y_, stats_y_);
    measure(r_, want_r_, stats_r_);
  }

  // After statistics().
  void forward_backward() {
    for (const bool second : {false, true}) {
      std::vector<uint8_t> mask(mask_bytes());
      scale_shift_act(apply(second, mask.data()), kWhere);
      check_forward(second, mask);
      for (const Gate gate : {Gate::kMask, Gate::kOutput}) {
        const void* source = gate == Gate::kMask ? mask.data() : out_.data();
        std::vector<float> partials(chunks_ * 3 * c_), sums(3 * c_);
        const BackwardReduceArgs reduce = reduction(second, gate, source, partials, sums);
        backward_reduce(reduce, kWhere);
        check_sums(second, sums);
        backward_apply(gradients(reduce), kWhere);
        check_gradients(second);
      }
    }
  }

  // After statistics(): the same by channel blocks.
  void channel_blocks() {
    for (const bool scaled : {false, true}) {
      std::vector<uint8_t> mask(mask_bytes());
      std::vector<double> partials(chunks_ * 2 * c_);
      std::fill(stats_y_.begin(), stats_y_.end(), NAN);
      norm_forward({statistics_of(y_, partials, nullptr, stats_y_), apply(scaled, mask.data())},
                   kWhere);
      check_stats(stats_y_, want_y_);
      check_forward(scaled, mask);
      std::vector<float> parts(chunks_ * 3 * c_), sums(3 * c_);
      const auto reduce = reduction(scaled, Gate::kMask, mask.data(), parts, sums);
      norm_backward({reduce, gradients(reduce)}, kWhere);
      check_sums(scaled, sums);
      check_gradients(scaled);
    }
  }

 private:
  // ---- what the kernels are told ----

  Affine affine() const { return {weight_.data(), bias_.data(), kEps}; }

  size_t mask_bytes() const { return size_t(s_.rows() * ((s_.cols() + 7) / 8)); }

  void measure(Tensor& x, const Rows& want, std::vector<float>& stats) {
    std::vector<double> partials(chunks_ * 2 * c_);
    std::vector<float> state(2 * c_);
    stats.assign(kStatsRows * c_, NAN);
    channel_stats(statistics_of(x, partials, state.data(), stats), kWhere);
    check_stats(stats, want);
    stats.assign(kStatsRows * c_, NAN);
    finalize_stats({state.data(), s_.count(), nullptr, nullptr, affine(), stats.data(), c_},
                   kWhere);
    check_stats(stats, want);
    stats.assign(kStatsRows * c_, NAN);
    finalize_stats({state.data(), s_.count(), nullptr, nullptr, affine(), stats.data(), c_},
                   kWhere);
    check_stats(stats, want);
  }

  ChannelStatsArgs statistics_of(Tensor& x, std::vector<double>& partials, float* state,
                                 std::vector<float>& stats) {
    return {x.data(), partials.data(), nullptr, 0, state, affine(), stats.data(), s_, t_};
  }

  ScaleShiftActArgs apply(bool scaled, uint8_t* mask) {
    return {y_.data(),
            stats_y_.data(),
            r_.data(),
            scaled ? stats_r_.data() : nullptr,
            out_.data(),
            mask,
            Activation::kRelu,
            s_,
            t_};
  }

  BackwardReduceArgs reduction(bool second, Gate gate, const void* source,
                               std::vector<float>& partials, std::vector<float>& sums) {
    return {grad_.data(),
            gate,
            Activation::kRelu,
            source,
            {y_.data(), second ? r_.data() : nullptr},
            {stats_y_.data(), second ? stats_r_.data() : nullptr},
            partials.data(),
            nullptr,
            sums.data(),
            s_,
            t_};
  }

  BackwardApplyArgs gradients(const BackwardReduceArgs& r) {
    return {r.grad_out,
            r.gate,
            r.act,
            r.gate_ptr,
            {r.y[0], r.y[1]},
            {r.stats[0], r.stats[1]},
            r.sums,
            s_.count(),
            {grad_y_.data(), r.y[1] ? grad_r_.data() : nullptr},
            r.y[1] ? nullptr : grad_r_.data(),
            s_,
            t_};
  }

  // ---- what they must answer ----

  void check(const char* what, int64_t at, double got, double want, bool stored = false) const {
    // float32 sums of a few hundred values of size 1; what is stored is rounded once more.
    const double unit = stored && s_.dtype == DType::kBFloat16 ? 0x1p-8 : 0;
    if (!(std::abs(got - want) <= unit * std::abs(want) + 2e-5 * (1 + std::abs(want)))) {
      throw std::runtime_error(std::string(what) + "[" + std::to_string(at) + "] must be " +
                               std::to_string(want) + ", got " + std::to_string(got));
    }
  }

  // Sums of f(i) over each channel.
  Row sum(const Tensor& x, const std::function<double(int64_t)>& f) const {
    Row total(c_);
    for (int64_t i = 0; i < x.size(); ++i) {
      total[x.channel(i)] += f(i);
    }
    return total;
  }

  Rows expected(const Tensor& x) const {
    Rows rows;
    rows[kMean] = sum(x, [&](int64_t i) { return x[i] / double(s_.count()); });
    rows[kVar] = sum(x, [&](int64_t i) {
      return std::pow(x[i] - rows[kMean][x.channel(i)], 2) / double(s_.count());
    });
    for (int64_t c = 0; c < c_; ++c) {
      rows[kInvstd].push_back(1 / std::sqrt(rows[kVar][c] + kEps));
      rows[kScale].push_back(weight_[c] * rows[kInvstd][c]);
      rows[kShift].push_back(bias_[c] - rows[kMean][c] * rows[kScale][c]);
    }
    return rows;
  }

  void check_stats(const std::vector<float>& got, const Rows& want) const {
    for (int row = 0; row < kStatsRows; ++row) {
      for (int64_t c = 0; c < c_; ++c) {
        check("stats", row * c_ + c, got[row * c_ + c], want[row][c]);
      }
    }
  }

  // Takes the bits out of the mask that it expects.
  void check_forward(bool scaled, std::vector<uint8_t> mask) const {
    for (int64_t i = 0; i < y_.size(); ++i) {
      const int64_t c = y_.channel(i), row = i / s_.cols(), col = i % s_.cols();
      const double residual = scaled ? want_r_[kScale][c] * r_[i] + want_r_[kShift][c] : r_[i];
      const double z = want_y_[kScale][c] * y_[i] + want_y_[kShift][c] + residual;
      check("out", i, out_[i], std::max(z, 0.0), true);
      uint8_t& byte = mask[row * ((s_.cols() + 7) / 8) + col / 8];
      check("mask", i, byte >> (col % 8) & 1, out_[i] > 0);
      byte = uint8_t(byte & ~(1 << (col % 8)));
    }
    check("padding", 0, double(std::count(mask.begin(), mask.end(), 0)), double(mask.size()));
  }

  double gated(int64_t i) const { return out_[i] > 0 ? grad_[i] : 0; }

  double normalised(const Tensor& x, const Rows& stats, int64_t i) const {
    const int64_t c = x.channel(i);
    return (x[i] - stats[kMean][c]) * stats[kInvstd][c];
  }

  Row products(const Tensor& x, const Rows& stats) const {
    return sum(x, [&](int64_t i) { return gated(i) * normalised(x, stats, i); });
  }

  void check_sums(bool second, const std::vector<float>& got) {
    sum_g_ = sum(y_, [&](int64_t i) { return gated(i); });
    sum_gy_ = products(y_, want_y_);
    sum_gr_ = products(r_, want_r_);
    for (int64_t c = 0; c < c_; ++c) {
      check("sum_g", c, got[c], sum_g_[c]);
      check("sum_gx1", c, got[c_ + c], sum_gy_[c]);
      if (second) {
        check("sum_gx2", c, got[2 * c_ + c], sum_gr_[c]);
      }
    }
  }

  void check_gradients(bool second) const {
    const auto want = [&](const Tensor& x, const Rows& stats, const Row& sum_gx, int64_t i) {
      const int64_t c = x.channel(i);
      const double mean_g = sum_g_[c] / double(s_.count()), mean = sum_gx[c] / double(s_.count());
      return stats[kScale][c] * (gated(i) - mean_g - normalised(x, stats, i) * mean);
    };
    for (int64_t i = 0; i < y_.size(); ++i) {
      check("grad_y1", i, grad_y_[i], want(y_, want_y_, sum_gy_, i), true);
      const double other = second ? want(r_, want_r_, sum_gr_, i) : gated(i);
      check(second ? "grad_y2" : "grad_residual", i, grad_r_[i], other, true);
    }
  }

  Activations s_;
  Tiling t_;
  int64_t c_;
  Tensor y_, r_, grad_, out_, grad_y_, grad_r_;
  int64_t chunks_;
  std::vector<float> weight_, bias_, stats_y_, stats_r_;
  Rows want_y_, want_r_;
  Row sum_g_, sum_gy_, sum_gr_;
};

void expect(const char* what, double got, double want) {
  if (!(std::abs(got - want) <= 1e-5 * std::abs(want))) {
    throw std::runtime_error(std::string(what) + " must be " + std::to_string(want) + ", got " +
                             std::to_string(got));
  }
}

// A cumulative average of two batches and a plain one of a third, by the same buffers.
void update_shared_norm() {
  constexpr int64_t kChannels = 2 * 256 + 3;
  std::vector<float> stats(kStatsRows * kChannels, 2), mean(kChannels, 5), var(kChannels, 1);
  int64_t counter = 3;
  RunningUpdate update{stats.data(),
                       kChannels,
                       1,
                       DType::kFloat32,
                       {mean.data(), 1, DType::kFloat32},
                       {var.data(), 1, DType::kFloat32},
                       &counter,
                       0.5,
                       true,
                       1.5,
                       kChannels};
  RunningUpdate updates[] = {update, update, update};
  updates[2].cumulative = false;
  update_running(updates, 3, kWhere);
  expect("counter", double(counter), 6);
  // Of 3 means of 5 and 2 of 2, then half and half with 2; a variance of 3 each time.
  for (int64_t c = 0; c < kChannels; ++c) {
    expect("running_mean", mean[c], (3.0 * 5 + 2 * 2) / 5 / 2 + 1);
    expect("running_var", var[c], (3.0 * 1 + 2 * 3) / 5 / 2 + 1.5);
  }
  updates[0].cumulative = updates[1].cumulative = false;  // several blocks
  update_running(updates, 3, kWhere);
  expect("counter", double(counter), 9);
  for (int64_t c = 0; c < kChannels; ++c) {
    expect("running_mean", mean[c], ((3.0 * 5 + 2 * 2) / 5 / 2 + 1) / 8 + 2 * 7.0 / 8);
  }
}

void run_all() {
  update_shared_norm();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t size : {16, 13}) {  // vectors, single elements
      Problem last({2, size, 9, Layout::kChannelsLast, dtype}, {64, 2, 7});
      last.statistics();
      last.forward_backward();
      Problem contiguous({3, 2, size, Layout::kContiguous, dtype}, {64, 2, 2});
      contiguous.statistics();
      contiguous.forward_backward();
    }
    Problem pipeline({2, 32, 9, Layout::kChannelsLast, dtype}, {64, 2, 7, kPipelineStages});
    pipeline.statistics();
    pipeline.forward_backward();
    for (const int width : {1, 2}) {
      Problem channel_blocks({2, 16, 9, Layout::kChannelsLast, dtype},
                             {kChannelBlockThreads, width, 9});
      channel_blocks.statistics();
      channel_blocks.channel_blocks();
    }
  }
}

}  // namespace

int main() {
  try {
    run_all();
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
}
