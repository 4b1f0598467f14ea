// CUDA threads as fibers of the launching thread, which take turns in a shuffled order.
#pragma once

#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "sanitizers.h"
#include "wave.h"

namespace fastres::cuda::emulation {

#if defined(__x86_64__)

using Context = void**;  // top of the stack

// What swapcontext does, without its system call.
__attribute__((naked, noinline)) inline void switch_stacks(Context* /*from*/, Context /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void jump(Context& from, Context& to) { switch_stacks(&from, to); }

// `main` is returned to, and finds the stack, which is all zero, as if nobody had called it.
inline void prepare(Context& context, void* stack, size_t size, void (*main)()) {
  constexpr int kSaved = 6;
  context = reinterpret_cast<void**>(static_cast<char*>(stack) + size) - 2 - kSaved;
  context[kSaved] = reinterpret_cast<void*>(main);
}

#else

using Context = ucontext_t;

inline void jump(Context& from, Context& to) { swapcontext(&from, &to); }

inline void prepare(Context& context, void* stack, size_t size, void (*main)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  makecontext(&context, main, 0);
}

#endif

// Does one piece of work after the other, each until it is over or yields.
class Fiber {
 public:
  Fiber()
      : memory_(static_cast<char*>(mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (memory_ == MAP_FAILED || mprotect(memory_, kGuard, PROT_NONE)) {
      throw std::bad_alloc();
    }
    own_.flow.stack = memory_ + kGuard;
    own_.flow.size = kStack;
    create_flow(own_.flow);
    prepare(own_.context, memory_ + kGuard, kStack, main);
  }
  ~Fiber() {
    destroy_flow(own_.flow);
    munmap(memory_, kGuard + kStack);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void begin(const Body& work) {
    work_ = &work;
    order_before(this);
  }
  void resume() {
    running_ = this;
    adopt_flow(host_.flow);
    change(host_, own_);
  }
  static void yield() { change(running_->own_, host_); }
  void end() { order_after(this); }

 private:
  struct Strand {
    Context context;
    Flow flow;
  };

  // A sanitizer's report needs most of it.
  static constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;

  static void change(Strand& from, Strand& to) {
    leave_flow(from.flow, to.flow);
    jump(from.context, to.context);
    enter_flow(from.flow);
  }

  static void main() {
    Fiber& self = *running_;
    enter_flow(self.own_.flow, &host_.flow);
    for (;;) {
      order_after(&self);
      (*self.work_)();
      order_before(&self);
      yield();
    }
  }

  static inline constinit thread_local Fiber* running_ = nullptr;
  static inline thread_local Strand host_;

  char* memory_;
  Strand own_;
  const Body* work_ = nullptr;
};

// The calling thread waits in a meeting; returns what it gets out of it.
inline uint64_t meet(const Arrival& arrival) {
  CudaThread& self = *current;
  const void* token = self.wave->meeting(self, arrival).token();
  if (arrival.orders_memory) {
    order_before(token);
  }
  {
    const Unseen unseen;
    self.arrival = arrival;
    self.status = CudaThread::Status::kWaiting;
    Fiber::yield();
    if (self.wave->failed()) {
      throw Unwind();
    }
  }
  if (arrival.orders_memory) {
    order_after(token);
  }
  return self.result;
}

// Calls body() as each of the wave's threads.
inline void run_wave(Wave& wave, const Enter& enter, const Body& body, std::minstd_rand& random) {
  static thread_local std::deque<Fiber> fibers;
  const Body work = [&] {
    const std::exception_ptr error = failure_of(body);
    const Unseen unseen;
    wave.fail(error);
    current->status = CudaThread::Status::kLeft;
  };
  const Unseen unseen;
  Wave::Threads ready = wave.everybody();
  const CudaThread* first = ready.front();
  const size_t count = ready.size();
  while (fibers.size() < count) {
    fibers.emplace_back();
  }
  for (size_t i = 0; i < count; ++i) {
    fibers[i].begin(work);
  }
  for (; !ready.empty(); ready = wave.next()) {
    std::shuffle(ready.begin(), ready.end(), random);
    for (CudaThread* thread : ready) {
      enter(*thread);
      fibers[thread - first].resume();
    }
  }
  for (size_t i = 0; i < count; ++i) {
    fibers[i].end();
  }
}

}  // namespace fastres::cuda::emulation
