// Kernel calls written down, and run again.
#include "cpu/program.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "cpu/allocator.h"

namespace fastres::cpu {
namespace {

thread_local Recording* t_recording = nullptr;

// ---- every address and every thread count of a kernel's arguments ----

template <class F>
void visit(ChannelStatsArgs& a, F& f) {
  f(a.y, a.state);
  f.threads(a.problem.threads);
}

template <class F>
void visit(ScaleShiftActArgs& a, F& f) {
  f(a.y, a.scale, a.shift, a.residual, a.residual_scale, a.residual_shift, a.out, a.mask);
  f.threads(a.problem.threads);
}

template <class F>
void visit(BackwardReduceArgs& a, F& f) {
  f(a.grad_out, a.gate_ptr, a.y[0], a.y[1], a.stats[0], a.stats[1], a.sums);
  f.threads(a.problem.threads);
}

template <class F>
void visit(BackwardApplyArgs& a, F& f) {
  f(a.grad_out, a.gate_ptr, a.y[0], a.y[1], a.stats[0], a.stats[1], a.sums, a.grad_y[0],
    a.grad_y[1], a.grad_residual);
  f.threads(a.problem.threads);
}

template <class F>
void visit(AddActArgs& a, F& f) {
  f(a.x, a.r, a.out, a.mask);
  f.threads(a.problem.threads);
}

template <class F>
void visit(ActBackwardArgs& a, F& f) {
  f(a.grad_out, a.gate_ptr, a.grad);
  f.threads(a.problem.threads);
}

template <class F>
void visit(ScaleShiftActPoolArgs& a, F& f) {
  f(a.y, a.scale, a.shift, a.out, a.argmax);
  f.threads(a.threads);
}

template <class F>
void visit(MaxPoolBackwardArgs& a, F& f) {
  f(a.grad_out, a.argmax, a.grad);
  f.threads(a.threads);
}

template <class F>
void visit(FinalizeStatsArgs& a, F& f) {
  f(a.state, a.running_mean, a.running_var, a.weight, a.bias, a.stats);
}

template <class F>
void visit(PackWeightArgs& a, F& f) {
  f(a.weight.weight, a.packed);
  f.threads(a.threads);
}

template <class F>
void visit(ConvForwardArgs& a, F& f) {
  f(a.input.x, a.input.scale, a.input.shift, a.weight.weight, a.packed, a.bias, a.y, a.state,
    a.scale, a.shift, a.residual);
  f.threads(a.threads);
}

template <class F>
void visit(ConvDataArgs& a, F& f) {
  visit(a.grad, f);
  f(a.weight.weight, a.packed, a.grad_x);
  visit(a.residual, f);
  visit(a.reduce, f);
  f.threads(a.threads);
}

template <class F>
void visit(ConvWeightArgs& a, F& f) {
  visit(a.grad, f);
  f(a.input.x, a.input.scale, a.input.shift, a.grad_weight);
  f.threads(a.threads);
}

template <class F>
void visit(RunningUpdate& a, F& f) {
  f(a.stats, a.mean.data, a.var.data, a.counter);
}

template <class F>
void visit(CopyArgs& a, F& f) {
  f(a.from, a.to);
}

template <class F>
void visit(Step& step, F& f) {
  std::visit([&](auto& args) { visit(args, f); }, step);
}

// Calls a function with each address that is not null.
template <class F>
struct EachAddress {
  const F& function;

  template <class... T>
  void operator()(T*&... pointers) {
    (one(pointers), ...);
  }
  void threads(int&) {}

 private:
  template <class T>
  void one(T*& pointer) {
    if (pointer) {
      const uintptr_t address = function(reinterpret_cast<uintptr_t>(pointer));
      pointer = reinterpret_cast<T*>(address);
    }
  }
};

template <class F>
void each_address(Step& step, const F& function) {
  EachAddress<F> visitor{function};
  visit(step, visitor);
}

struct SetThreads {
  int count;

  template <class... T>
  void operator()(T*&...) {}
  void threads(int& threads) { threads = count; }
};

// ---- what a step does ----

struct Run {
  const KernelTable& table = active_table();

  void operator()(const ChannelStatsArgs& a) const { table.channel_stats(a); }
  void operator()(const ScaleShiftActArgs& a) const { table.scale_shift_act(a); }
  void operator()(const BackwardReduceArgs& a) const { table.backward_reduce(a); }
  void operator()(const BackwardApplyArgs& a) const { table.backward_apply(a); }
  void operator()(const AddActArgs& a) const { table.add_act(a); }
  void operator()(const ActBackwardArgs& a) const { table.act_backward(a); }
  void operator()(const ScaleShiftActPoolArgs& a) const { table.scale_shift_act_pool(a); }
  void operator()(const MaxPoolBackwardArgs& a) const { table.max_pool_backward(a); }
  void operator()(const FinalizeStatsArgs& a) const { finalize_stats(a); }
  void operator()(const PackWeightArgs& a) const {
    a.winograd ? table.pack_winograd(a) : table.convolutions(a.shape).pack_weight(a);
  }
  void operator()(const ConvForwardArgs& a) const { table.convolutions(a.shape).conv_forward(a); }
  void operator()(const ConvDataArgs& a) const {
    table.convolutions(a.shape).conv_backward_data(a);
  }
  void operator()(const ConvWeightArgs& a) const {
    table.convolutions(a.shape).conv_backward_weight(a);
  }
  void operator()(const RunningUpdate& a) const { update_running(a); }
  void operator()(const CopyArgs& a) const { copy(a); }
};

// ---- memory that lives for one run ----

struct Lifetime {
  int64_t first = -1, last = -1;  // steps that use it
  int64_t bytes, offset = 0;
};

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Gives each a place in one piece of memory, no two that live at once the same; returns its size.
// The largest first, of equal ones the earliest, each as low as it can be.
int64_t lay_out(std::vector<Lifetime>& all) {
  std::vector<Lifetime*> order, placed;
  for (Lifetime& one : all) {
    if (one.first >= 0) {
      order.push_back(&one);
    }
  }
  std::stable_sort(order.begin(), order.end(), [](const Lifetime* a, const Lifetime* b) {
    return a->bytes != b->bytes ? a->bytes > b->bytes : a->first < b->first;
  });
  int64_t total = 0;
  for (Lifetime* one : order) {
    // `placed` is in the order of offsets.
    for (const Lifetime* other : placed) {
      const bool together = other->first <= one->last && one->first <= other->last;
      if (together && other->offset < one->offset + one->bytes) {
        one->offset = std::max(one->offset, other->offset + other->bytes);
      }
    }
    const auto behind = [](const Lifetime* a, const Lifetime* b) { return a->offset < b->offset; };
    placed.insert(std::upper_bound(placed.begin(), placed.end(), one, behind), one);
    total = std::max(total, one->offset + one->bytes);
  }
  return total;
}

// Which of `memories` an address lies in, or -1.
int64_t find(const std::vector<Memory>& memories, uintptr_t address) {
  for (size_t i = 0; i < memories.size(); ++i) {
    if (address >= memories[i].begin && address - memories[i].begin < size_t(memories[i].bytes)) {
      return int64_t(i);
    }
  }
  return -1;
}

class ScratchBlock {
 public:
  explicit ScratchBlock(int64_t bytes)
      : block_(bytes > 0 ? allocate_or_throw(size_t(bytes)) : nullptr) {}
  ~ScratchBlock() {
    if (block_) {
      release(block_);
    }
  }
  ScratchBlock(const ScratchBlock&) = delete;
  ScratchBlock& operator=(const ScratchBlock&) = delete;
  uintptr_t begin() const { return block_ ? reinterpret_cast<uintptr_t>(address(block_)) : 0; }

 private:
  Block* block_;
};

constexpr int64_t kAsItStands = -1, kScratch = -2;

}  // namespace

Recording::Recording() : outer_(t_recording) { t_recording = this; }
Recording::~Recording() { t_recording = outer_; }
Recording* Recording::active() { return t_recording; }

void perform(const Step& step) {
  if (t_recording) {
    t_recording->steps.push_back(step);
  } else {
    std::visit(Run{}, step);
  }
}

Program::Program(std::vector<Step> steps, const std::vector<Memory>& given,
                 const std::vector<Memory>& own, const std::vector<Memory>& fixed,
                 std::vector<PackedWeight> packed)
    : steps_(std::move(steps)),
      packed_(std::move(packed)),
      given_(given.size()),
      table_(&active_table()) {
  std::vector<Lifetime> lives(own.size());
  for (size_t i = 0; i < own.size(); ++i) {
    lives[i].bytes = rounded(own[i].bytes);
  }
  std::vector<int64_t> temporary;  // which of `own` each place means, or -1
  for (size_t s = 0; s < steps_.size(); ++s) {
    each_address(steps_[s], [&](uintptr_t address) {
      int64_t index = find(given, address), which = -1;
      if (index >= 0) {
        places_.push_back({index, int64_t(address - given[size_t(index)].begin)});
      } else if ((which = find(own, address)) >= 0) {
        places_.push_back({kScratch, int64_t(address - own[size_t(which)].begin)});
        Lifetime& life = lives[size_t(which)];
        life.first = life.first < 0 ? int64_t(s) : life.first;
        life.last = int64_t(s);
      } else if (find(fixed, address) >= 0) {
        places_.push_back({kAsItStands, 0});
      } else {
        throw std::invalid_argument("a step uses memory that is not the program's");
      }
      temporary.push_back(which);
      return address;
    });
  }
  scratch_bytes_ = lay_out(lives);
  for (size_t i = 0; i < places_.size(); ++i) {
    if (temporary[i] >= 0) {
      places_[i].offset += lives[size_t(temporary[i])].offset;
    }
  }
}

bool Program::holds(const std::vector<uintptr_t>& given) const {
  if (table_ != &active_table()) {
    return false;
  }
  return std::all_of(packed_.begin(), packed_.end(), [&](const PackedWeight& one) {
    const void* weight = reinterpret_cast<const void*>(given[one.given]);
    return given[one.given] == one.address &&
           sample_weight(weight, one.dtype, one.shape.data(), one.strides.data()) == one.sample;
  });
}

bool Program::run(const std::vector<uintptr_t>& given, int threads) const {
  if (given.size() != given_) {
    throw std::invalid_argument("a run needs as many memories as the program was made for");
  }
  if (!holds(given)) {
    return false;
  }
  const ScratchBlock scratch(scratch_bytes_);
  const Place* place = places_.data();
  SetThreads set_threads{threads};
  for (Step step : steps_) {
    each_address(step, [&](uintptr_t address) {
      const auto [index, offset] = *place++;
      if (index == kAsItStands) {
        return address;
      }
      return (index == kScratch ? scratch.begin() : given[size_t(index)]) + uintptr_t(offset);
    });
    visit(step, set_threads);
    std::visit(Run{}, step);
  }
  return true;
}

}  // namespace fastres::cpu
