// Which copy of the kernels runs.
#include <atomic>
#include <cstring>

#include "cpu/kernels.h"

#define FASTRES_ISA baseline
#include "cpu/table.h"
#undef FASTRES_ISA
#ifdef FASTRES_HAS_X86
#define FASTRES_ISA avx2
#include "cpu/table.h"
#undef FASTRES_ISA
#define FASTRES_ISA avx512
#include "cpu/table.h"
#undef FASTRES_ISA
#endif

namespace fastres::cpu {
namespace {

#define FASTRES_TABLE(isa)    \
  {#isa,                      \
   isa##_runs_here,           \
   isa::channel_stats,        \
   isa::scale_shift_act,      \
   isa::backward_reduce,      \
   isa::backward_apply,       \
   isa::add_act,              \
   isa::act_backward,         \
   isa::packed_size,          \
   isa::packs_ahead,          \
   isa::pack_weight,          \
   isa::winograd_size,        \
   isa::pack_winograd,        \
   isa::conv_forward,         \
   isa::conv_backward_data,   \
   isa::conv_backward_weight, \
   isa::shares}

bool baseline_runs_here() { return true; }
const KernelTable kBaseline = FASTRES_TABLE(baseline);

#ifdef FASTRES_HAS_X86
// The builtin also asks whether the operating system saves the registers. F16C, which the AVX2
// kernels use as well, came to CPUs before AVX2 did.
bool avx2_runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool avx512_runs_here() {
  return avx2_runs_here() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
const KernelTable kAvx2 = FASTRES_TABLE(avx2);
const KernelTable kAvx512 = FASTRES_TABLE(avx512);
const KernelTable* const kBuilt[] = {&kAvx512, &kAvx2, &kBaseline};
#else
const KernelTable* const kBuilt[] = {&kBaseline};
#endif

const KernelTable* best_table() {
  for (const KernelTable* table : kBuilt) {
    if (table->supported()) {
      return table;
    }
  }
  return &kBaseline;
}

std::atomic<const KernelTable*> g_active{nullptr};

}  // namespace

const KernelTable* const* built_tables(int* count) {
  *count = int(sizeof(kBuilt) / sizeof(kBuilt[0]));
  return kBuilt;
}

const KernelTable& active_table() {
  const KernelTable* table = g_active.load(std::memory_order_acquire);
  if (!table) {
    table = best_table();
    g_active.store(table, std::memory_order_release);
  }
  return *table;
}

bool select_table(const char* name) {
  for (const KernelTable* table : kBuilt) {
    if (!strcmp(table->name, name) && table->supported()) {
      g_active.store(table, std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace fastres::cpu
