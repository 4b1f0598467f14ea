// What sanitizers are told about fibers. Without them, nothing.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace fastres::cuda::emulation {

#if defined(__SANITIZE_THREAD__)
inline constexpr bool kSeesRaces = true;
#else
inline constexpr bool kSeesRaces = false;
#endif

// A flow of control as AddressSanitizer knows it, by its stack, and ThreadSanitizer.
struct Flow {
  const void* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
  void* fiber = nullptr;
};

inline void create_flow([[maybe_unused]] Flow& flow) {
#if defined(__SANITIZE_THREAD__)
  flow.fiber = __tsan_create_fiber(0);
#endif
}

inline void destroy_flow([[maybe_unused]] Flow& flow) {
#if defined(__SANITIZE_THREAD__)
  __tsan_destroy_fiber(flow.fiber);
#endif
#if defined(__SANITIZE_ADDRESS__)
  // What is mapped here next is not to find this stack's redzones.
  ASAN_UNPOISON_MEMORY_REGION(flow.stack, flow.size);
#endif
}

// The thread that calls is this flow.
inline void adopt_flow([[maybe_unused]] Flow& flow) {
#if defined(__SANITIZE_THREAD__)
  flow.fiber = __tsan_get_current_fiber();
#endif
}

// Right before the stacks are switched: that alone puts nothing in order.
inline void leave_flow([[maybe_unused]] Flow& from, [[maybe_unused]] const Flow& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#endif
}

// Right after it. `from` is told its stack, where it is not known yet.
inline void enter_flow([[maybe_unused]] Flow& flow, [[maybe_unused]] Flow* from = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(flow.fake_stack, from ? &from->stack : nullptr,
                                  from ? &from->size : nullptr);
#endif
}

// Whatever happened before order_before happened before all that comes after order_after.
inline void order_before([[maybe_unused]] const void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(const_cast<void*>(token));
#endif
}
inline void order_after([[maybe_unused]] const void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(const_cast<void*>(token));
#endif
}

// ThreadSanitizer does not look at what the calling flow reads and writes meanwhile.
class Unseen {
 public:
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

}  // namespace fastres::cuda::emulation
