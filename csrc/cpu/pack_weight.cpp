// Whole weights in the order in which tiles read them.
#include "cpu/convolve.h"
#include "cpu/table.h"

namespace fastres::cpu::FASTRES_ISA {

template <class T>
int64_t packed_size(const ConvShape& s, bool transposed) {
  const int64_t columns = transposed ? s.c : s.k, depth = transposed ? s.k : s.c;
  return round_up(columns, kTileColumns) * s.taps() * steps_of<Operand<T>>(depth);
}

template <class T>
bool packs_ahead(const ConvShape& s, bool transposed) {
  return PanelCut(transposed ? data_gradient_sweep(s) : forward_sweep(s)).panels > 1;
}

template <class T>
void pack_weight(const PackWeightArgs& a) {
  using E = Operand<T>;
  const WeightView<T> view(a.weight, a.shape, a.transposed);
  constexpr int64_t kSteps = 64;
  const int64_t blocks = ceil_div(view.columns, kTileColumns);
  const int64_t steps = a.shape.taps() * steps_of<E>(view.depth), parts = ceil_div(steps, kSteps);
  const int64_t bytes = packed_size<T>(a.shape, a.transposed) * int64_t(sizeof(E));
  parallel(a.threads, bytes, [&](Worker worker) {
    const Range tasks = worker.share(blocks * parts);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t block = task / parts, begin = task % parts * kSteps;
      view.pack(block * kTileColumns, {begin, at_most(begin + kSteps, steps)},
                (E*)a.packed + (block * steps + begin) * kTileColumns);
    }
  });
}

FASTRES_CONVOLUTIONS(template int64_t packed_size, (const ConvShape&, bool))
FASTRES_CONVOLUTIONS(template bool packs_ahead, (const ConvShape&, bool))
FASTRES_CONVOLUTIONS(template void pack_weight, (const PackWeightArgs&))

}  // namespace fastres::cpu::FASTRES_ISA
