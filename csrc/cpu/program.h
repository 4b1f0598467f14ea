// A sequence of kernel calls, written down once and run again on other memory.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "cpu/kernels.h"

namespace fastres::cpu {

using Step = std::variant<ChannelStatsArgs, ScaleShiftActArgs, BackwardReduceArgs,
                          BackwardApplyArgs, AddActArgs, ActBackwardArgs, ScaleShiftActPoolArgs,
                          MaxPoolBackwardArgs, FinalizeStatsArgs, PackWeightArgs, ConvForwardArgs,
                          ConvDataArgs, ConvWeightArgs, RunningUpdate, CopyArgs>;

// While one lives, the kernels that its thread calls are written down instead of run.
class Recording {
 public:
  Recording();
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  static Recording* active();

  std::vector<Step> steps;

 private:
  Recording* outer_;
};

// Runs a kernel, or writes it down.
void perform(const Step& step);

struct Memory {
  uintptr_t begin;
  int64_t bytes;
};

// A weight that was packed when the program was made, and must not have changed since.
struct PackedWeight {
  size_t given;  // which of the memories that a run is given
  uintptr_t address;
  DType dtype;
  std::vector<int64_t> shape, strides;
  int64_t sample;
};

class Program {
 public:
  // given: what each run brings anew; own: what lives for one run only; fixed: what stays. Throws
  // std::invalid_argument where a step reads other memory than these.
  Program(std::vector<Step> steps, const std::vector<Memory>& given, const std::vector<Memory>& own,
          const std::vector<Memory>& fixed, std::vector<PackedWeight> packed);

  // False, and nothing was run, where the instruction set or a packed weight is another by now.
  bool run(const std::vector<uintptr_t>& given, int threads) const;

  size_t steps() const { return steps_.size(); }
  int64_t scratch_bytes() const { return scratch_bytes_; }

 private:
  // Where an address of a step comes from: of a run's memories, of its scratch, or as it stands.
  struct Place {
    int64_t index, offset;
  };

  bool holds(const std::vector<uintptr_t>& given) const;

  std::vector<Step> steps_;
  std::vector<Place> places_;  // of all addresses, in the order of the steps
  std::vector<PackedWeight> packed_;
  size_t given_;
  int64_t scratch_bytes_ = 0;
  const KernelTable* table_;
};

}  // namespace fastres::cpu
