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
#define FASTRES_ISA avx512_bf16
#include "cpu/table.h"
#undef FASTRES_ISA
#endif

namespace fastres::cpu {
namespace {

#define FASTRES_CONV_TABLE(isa, T)                                                 \
  {isa::packed_size<T>,  isa::packs_ahead<T>,        isa::pack_weight<T>,          \
   isa::conv_forward<T>, isa::conv_backward_data<T>, isa::conv_backward_weight<T>, \
   isa::shares<T>}

// AVX512-BF16 has nothing but bfloat16's convolutions of its own.
#define FASTRES_TABLE(name, isa, bfloat16_isa) \
  {#name,                                      \
   name##_runs_here,                           \
   isa::channel_stats,                         \
   isa::scale_shift_act,                       \
   isa::backward_reduce,                       \
   isa::backward_apply,                        \
   isa::add_act,                               \
   isa::act_backward,                          \
   isa::scale_shift_act_pool,                  \
   isa::max_pool_backward,                     \
   isa::winograd_size,                         \
   isa::pack_winograd,                         \
   FASTRES_CONV_TABLE(isa, float),             \
   FASTRES_CONV_TABLE(bfloat16_isa, BFloat16)}

bool baseline_runs_here() { return true; }
const KernelTable kBaseline = FASTRES_TABLE(baseline, baseline, baseline);

#ifdef FASTRES_HAS_X86
// The builtin also asks whether the operating system saves the registers. F16C, which the AVX2
// kernels use as well, came to CPUs before AVX2 did.
bool avx2_runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool avx512_runs_here() {
  return avx2_runs_here() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool avx512_bf16_runs_here() { return avx512_runs_here() && __builtin_cpu_supports("avx512bf16"); }
const KernelTable kAvx2 = FASTRES_TABLE(avx2, avx2, avx2);
const KernelTable kAvx512 = FASTRES_TABLE(avx512, avx512, avx512);
const KernelTable kAvx512Bf16 = FASTRES_TABLE(avx512_bf16, avx512, avx512_bf16);
const KernelTable* const kBuilt[] = {&kAvx512Bf16, &kAvx512, &kAvx2, &kBaseline};
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
