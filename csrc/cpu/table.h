// What every instruction set's copy of the kernels must define. No include guard: dispatch.cpp
// reads it once per FASTRES_ISA.
#include "cpu/kernels.h"

// What a source file defines for each T. AVX512-BF16 has a namespace of its own, and nothing to add
// for float32.
#ifndef FASTRES_CONVOLUTIONS
#if defined(__AVX512BF16__)
#define FASTRES_CONVOLUTIONS(function, parameters) function<BFloat16> parameters;
#else
#define FASTRES_CONVOLUTIONS(function, parameters) \
  function<float> parameters;                      \
  function<BFloat16> parameters;
#endif
#endif

namespace fastres::cpu::FASTRES_ISA {

void channel_stats(const ChannelStatsArgs& args);
void scale_shift_act(const ScaleShiftActArgs& args);
void backward_reduce(const BackwardReduceArgs& args);
void backward_apply(const BackwardApplyArgs& args);
void add_act(const AddActArgs& args);
void act_backward(const ActBackwardArgs& args);
void scale_shift_act_pool(const ScaleShiftActPoolArgs& args);
void max_pool_backward(const MaxPoolBackwardArgs& args);
// Of convolutions by three by three taps in steps of one.
int64_t winograd_size(const ConvShape& shape, bool transposed);
void pack_winograd(const PackWeightArgs& args);

// ---- for tensors of T: float or BFloat16 ----

template <class T>
int64_t packed_size(const ConvShape& shape, bool transposed);
// Whether a weight is used often enough to be packed as a whole.
template <class T>
bool packs_ahead(const ConvShape& shape, bool transposed);
template <class T>
void pack_weight(const PackWeightArgs& args);
template <class T>
void conv_forward(const ConvForwardArgs& args);
template <class T>
void conv_backward_data(const ConvDataArgs& args);
template <class T>
void conv_backward_weight(const ConvWeightArgs& args);
template <class T>
void shares(const SharesArgs& args);
template <class T>
void weight_shares(const SharesArgs& args);

}  // namespace fastres::cpu::FASTRES_ISA
