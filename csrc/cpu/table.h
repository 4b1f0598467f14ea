// What every instruction set's copy of the kernels must define. No include guard: dispatch.cpp
// reads it once per FASTRES_ISA.
#include "cpu/kernels.h"

namespace fastres::cpu::FASTRES_ISA {

void channel_stats(const ChannelStatsArgs& args);
void scale_shift_act(const ScaleShiftActArgs& args);
void backward_reduce(const BackwardReduceArgs& args);
void backward_apply(const BackwardApplyArgs& args);
void add_act(const AddActArgs& args);
void act_backward(const ActBackwardArgs& args);
int64_t packed_size(const ConvShape& shape, bool transposed);
// Whether a weight is used often enough to be packed as a whole.
bool packs_ahead(const ConvShape& shape, bool transposed);
void pack_weight(const PackWeightArgs& args);
// Of convolutions by three by three taps in steps of one.
int64_t winograd_size(const ConvShape& shape, bool transposed);
void pack_winograd(const PackWeightArgs& args);
void conv_forward(const ConvForwardArgs& args);
void conv_backward_data(const ConvDataArgs& args);
void conv_backward_weight(const ConvWeightArgs& args);
void shares(const SharesArgs& args);
void weight_shares(const SharesArgs& args);

}  // namespace fastres::cpu::FASTRES_ISA
