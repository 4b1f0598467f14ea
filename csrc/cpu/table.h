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

}  // namespace fastres::cpu::FASTRES_ISA
