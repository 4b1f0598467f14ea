// Convolutions and their data gradients.
#include "cpu/block_stats.h"
#include "cpu/convolve.h"
#include "cpu/gradient_sums.h"
#include "cpu/table.h"
#include "cpu/winograd.h"

namespace fastres::cpu::FASTRES_ISA {
namespace {

// Rows of the output that a panel covers.
FASTRES_INLINE double rows_of(const Sweep& s, const PanelCut& cut, int64_t panel) {
  const int64_t end = at_most((panel + 1) * cut.lines, s.n * s.lines);
  return double(rows_before(s, end) - rows_before(s, panel * cut.lines));
}

const auto kNothing = [](auto&&...) {};

// A pass over what a panel's products left, for an activation that the tile does not know.
template <class T>
void activate(T* y, const ConvForwardArgs& a, Range rows, Range columns) {
  const AnyActivation<float> act = any_activation<float>(a.act);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    T* p = y + row * a.shape.k;
    int64_t col = columns.begin;
    for (; col + kPack <= columns.end; col += kPack) {
      store(p + col, act.value(load(p + col, Full{})), Full{});
    }
    if (col < columns.end) {
      const Part rest{int(columns.end - col)};
      store(p + col, act.value(load(p + col, rest)), rest);
    }
  }
}

// Calls f(sweep, sweeper, packed weight, sweep without squares) with what computes a convolution. A
// weight that squares do not serve is packed anew here.
template <class T, class F>
void with_sweeper(const Sweep& direct, const ConvShape& shape, const ConvWeight& weight,
                  const void* given, bool winograd, bool transposed, int threads, const F& f) {
  const auto* packed = (const Operand<T>*)given;
  if constexpr (std::is_same_v<T, float>) {
    if (winograd && PointWeight{direct.out_c, direct.in_c}.fits(packed)) {
      return f(in_squares(direct), TypeTag<WinogradSweeper>{}, packed, &direct);
    }
    if (winograd && PanelCut(direct).panels > 1) {
      const Scratch<float> own(packed_size<float>(shape, transposed));
      pack_weight<float>({weight, transposed, own.data(), shape, threads});
      return f(direct, TypeTag<Sweeper<>>{}, own.data(), nullptr);
    }
    packed = winograd ? nullptr : packed;
  }
  f(direct, TypeTag<Sweeper<T>>{}, packed, nullptr);
}

// A convolution, and the state of its output.
template <class Sweeper, class T>
void run_with_stats(const Sweep& s, const SweepArgs<T>& args, const ConvForwardArgs& a) {
  const PanelCut cut = Sweeper::cut(s);
  const int64_t k = s.out_c;
  const Scratch<double> partial(cut.panels * 2 * k);
  const ChannelStatsArgs stats{
      a.y,
      a.state,
      0,
      {{s.n * s.out_h * s.out_w, k, 1, Layout::kChannelsLast, a.shape.dtype}, a.threads}};
  run_sweep<Sweeper>(
      s, args, kNothing,
      [&](int64_t panel, Range rows, Range columns) {
        const BlockScratch<float> scratch(columns.end - columns.begin);
        block_stats(args.out, k, rows, columns, scratch, partial.data() + panel * 2 * k, true);
      },
      [&](Worker worker, const PanelCut& cut) {
        merge_channels(stats, partial.data(), cut.panels, worker.share(k, 8),
                       [&](int64_t panel) { return rows_of(s, cut, panel); });
      });
}

}  // namespace

template <class T>
void conv_forward(const ConvForwardArgs& a) {
  const bool known = a.act == Activation::kNone || a.act == Activation::kRelu;
  const auto run = [&](const Sweep& s, auto sweeper, const Operand<T>* packed,
                       const Sweep* direct) {
    using Sweeper = typename decltype(sweeper)::type;
    const T* residual = (const T*)a.residual;
    with_input<T>(a.input, a.shape.c, [&](const Source<Formed<Operand<T>>>& source) {
      const SweepArgs<T> args{.source = source,
                              .plain = a.input.scale ? nullptr : (const T*)a.input.x,
                              .weight = WeightView<T>(a.weight, a.shape, false),
                              .packed = packed,
                              .out = (T*)a.y,
                              .residual = residual,
                              .bias = (const T*)a.bias,
                              .scale = a.scale,
                              .shift = a.shift,
                              .relu = a.act == Activation::kRelu,
                              .threads = a.threads,
                              .late = residual,
                              .direct = direct};
      if (a.state) {
        run_with_stats<Sweeper>(s, args, a);
      } else if (known) {
        run_sweep<Sweeper>(s, args, kNothing, kNothing, kNothing);
      } else {
        run_sweep<Sweeper>(
            s, args, kNothing,
            [&](int64_t, Range rows, Range columns) { activate(args.out, a, rows, columns); },
            kNothing);
      }
    });
  };
  with_sweeper<T>(forward_sweep(a.shape), a.shape, a.weight, a.packed, a.winograd, false, a.threads,
                  run);
}

namespace {

// The gated gradient of the residual, where the products are to be added to it.
template <class T>
void form_residual(const ActBackwardArgs& a, T* to, int64_t cols, Range rows, Range columns) {
  with_gating(a.gate, a.act, [&](auto gate) {
    constexpr Gating kGate = decltype(gate)::value;
    if constexpr (kGate != Gating::kReluOfY) {
      const auto gradient = gated_gradient<T, true, kGate>(a);
      const auto visit = [&](int64_t row, int64_t col, auto lanes) {
        const auto params = gradient.params(col, lanes);
        const Pack<float> g = gradient.get(row, col, params, lanes, broadcast(0.0f));
        store(to + row * cols + col, g, lanes);
      };
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        int64_t col = columns.begin;
        for (; col + kPack <= columns.end; col += kPack) {
          visit(row, col, Full{});
        }
        if (col < columns.end) {
          visit(row, col, Part{int(columns.end - col)});
        }
      }
    }
  });
}

template <class Sweeper, class T, class Before>
void run_with_sums(const Sweep& s, const SweepArgs<T>& args, const BackwardReduceArgs& a,
                   const Before& before) {
  const PanelCut cut = Sweeper::cut(s);
  const int64_t c = s.out_c;
  with_gating(a.gate, a.act, [&](auto gate) {
    const auto op = gradient_sums<T, true, decltype(gate)::value, 1>(a);
    using Op = std::remove_const_t<decltype(op)>;
    const Scratch<double> partial(cut.panels * Op::kSums * c);
    run_sweep<Sweeper>(
        s, args, before,
        [&](int64_t panel, Range rows, Range columns) {
          const int64_t width = columns.end - columns.begin, stride = round_up(width, kPack);
          const Scratch<double> sums(Op::kSums * stride);
          sum_columns(op, rows, columns, c, sums.data(), stride, true);
          for (int k = 0; k < Op::kSums; ++k) {
            memcpy(partial.data() + (panel * Op::kSums + k) * c + columns.begin,
                   sums.data() + k * stride, sizeof(double) * size_t(width));
          }
        },
        [&](Worker worker, const PanelCut& cut) {
          join_sums<float, Op::kSums>(a, partial.data(), cut.panels, worker.share(c, 8));
        });
  });
}

}  // namespace

template <class T>
void conv_backward_data(const ConvDataArgs& a) {
  const bool residual = a.residual.grad_out != nullptr;
  const auto run = [&](const Sweep& s, auto sweeper, const Operand<T>* packed,
                       const Sweep* direct) {
    using Sweeper = typename decltype(sweeper)::type;
    with_gradient<T>(a.grad, [&](const Source<Formed<Operand<T>>>& source) {
      const SweepArgs<T> args{.source = source,
                              .plain = a.grad.stats[0] ? nullptr : (const T*)a.grad.grad_out,
                              .weight = WeightView<T>(a.weight, a.shape, true),
                              .packed = packed,
                              .out = (T*)a.grad_x,
                              .accumulate = a.accumulate || residual,
                              .threads = a.threads,
                              .late = (const T*)a.reduce.y[0],
                              .direct = direct};
      const auto before = [&](Range rows, Range columns) {
        if (residual) {
          form_residual(a.residual, args.out, s.out_c, rows, columns);
        }
      };
      if (a.reduce.sums) {
        run_with_sums<Sweeper>(s, args, a.reduce, before);
      } else {
        run_sweep<Sweeper>(s, args, before, kNothing, kNothing);
      }
    });
  };
  with_sweeper<T>(data_gradient_sweep(a.shape), a.shape, a.weight, a.packed, a.winograd, true,
                  a.threads, run);
}

namespace {

void sweep_shares(const Sweep& s, const PanelCut& cut, const SharesArgs& a) {
  const Tasks tasks(cut, s.out_c, a.team);
  for (int id = 0; id < a.team; ++id) {
    const Range own = Worker{id, a.team}.share(tasks.count());
    a.shares[id] = 0;
    for (int64_t task = own.begin; task < own.end; ++task) {
      const int64_t panel = tasks.panel(task);
      const Range columns = tasks.columns(task, s.out_c);
      const int64_t lines = at_most((panel + 1) * cut.lines, s.n * s.lines) - panel * cut.lines;
      a.shares[id] += lines * ceil_div(columns.end - columns.begin, kTileColumns);
    }
  }
}

}  // namespace

template <class T>
void shares(const SharesArgs& a) {
  if (a.pass == Pass::kWeightGradient) {
    weight_shares<T>(a);
    return;
  }
  const bool forward = a.pass == Pass::kForward;
  const Sweep direct = forward ? forward_sweep(a.shape) : data_gradient_sweep(a.shape);
  if (a.winograd) {
    const Sweep squares = in_squares(direct);
    sweep_shares(squares, WinogradSweeper::cut(squares), a);
  } else {
    sweep_shares(direct, Sweeper<T>::cut(direct), a);
  }
}

FASTRES_CONVOLUTIONS(template void conv_forward, (const ConvForwardArgs&))
FASTRES_CONVOLUTIONS(template void conv_backward_data, (const ConvDataArgs&))
FASTRES_CONVOLUTIONS(template void shares, (const SharesArgs&))

}  // namespace fastres::cpu::FASTRES_ISA
