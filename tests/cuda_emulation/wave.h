// The threads of the blocks that are alive at the same time, and where they meet.
//
// A thread runs until it has to wait for others. Only when all of them wait (or have left the
// kernel) are meetings looked at: those that everybody has come to are over, and if there is none,
// nobody will ever go on, and the reason stands in the threads' states.
#pragma once

#include <bit>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "launch.h"

namespace fastres::cuda::emulation {

// Whom a thread waits for.
enum class Scope { kWarp, kBlock, kGrid };

struct Arrival {
  Scope scope;
  const char* operation;
  std::source_location site;
  // False of what exchanges registers and promises nothing about memory.
  bool orders_memory = true;
  uint32_t mask = 0;   // lanes of a warp's operation
  uint64_t value = 0;  // what a lane brings to it
  int source = -1;     // the lane whose value it takes; -1: the lanes whose value is not zero

  bool same_as(const Arrival& other) const {
    return scope == other.scope && mask == other.mask && site.line() == other.site.line() &&
           site.column() == other.site.column() && same(operation, other.operation) &&
           same(site.file_name(), other.site.file_name());
  }

 private:
  static bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }
};

// Of the threads of a scope, or of the lanes of a mask.
struct Meeting {
  unsigned held = 0;
  char tokens[2];  // addresses that stand for the order it makes; a fast thread is one ahead

  const void* token() const { return &tokens[held % 2]; }
};

struct Warp {
  Meeting meetings[kWarp];  // by the lowest lane of the mask
};

struct FreeShared {
  void operator()(std::byte* p) const { operator delete[](p, std::align_val_t(16)); }
};

struct Block {
  Block(int64_t index, const LaunchShape& shape)
      : index(index),
        // Of exactly this size, so that AddressSanitizer sees an access beyond it.
        shared(static_cast<std::byte*>(operator new[](shape.shared_bytes, std::align_val_t(16)))),
        warps((shape.threads + kWarp - 1) / kWarp) {
    std::memset(shared.get(), 0xff, shape.shared_bytes);  // NaN in every type
  }

  int64_t index;
  std::unique_ptr<std::byte[], FreeShared> shared;
  std::vector<Warp> warps;
  Meeting meeting;
};

// Copies that a thread has begun and not waited for. A GPU makes them at any time in between; here
// it is done at once or when they are waited for, as chance has it, so that nobody relies on
// either.
class Copies {
 public:
  explicit Copies(unsigned long seed = 0) : random_(seed + 1) {}

  void begin(void* to, const void* from, size_t size) {
    const Copy copy{to, from, size, groups_};
    random_() % 2 ? copy.make() : begun_.push_back(copy);
  }
  void commit() { ++groups_; }
  void wait(int64_t pending) {
    std::erase_if(begun_, [&](const Copy& copy) {
      const bool due = copy.group < groups_ - pending;
      if (due) {
        copy.make();
      }
      return due;
    });
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t size;
    int64_t group;

    void make() const { std::memcpy(to, from, size); }
  };

  std::minstd_rand random_;
  std::vector<Copy> begun_;
  int64_t groups_ = 0;
};

class Wave;

struct CudaThread {
  enum class Status { kRunning, kWaiting, kLeft };

  Wave* wave;
  Block* block;
  int index;
  Status status = Status::kRunning;
  Arrival arrival{};
  uint64_t result = 0;
  Copies copies{};

  int lane() const { return index % kWarp; }
  bool waits(Scope scope) const { return status == Status::kWaiting && arrival.scope == scope; }
  bool waits_with(const CudaThread& other) const {
    return status == Status::kWaiting && arrival.same_as(other.arrival);
  }
  std::string name() const {
    return "block " + std::to_string(block->index) + ", thread " + std::to_string(index);
  }
  std::string state() const {
    return status == Status::kLeft
               ? "has left the kernel"
               : std::string("waits in ") + arrival.operation + "() at " + place(arrival.site);
  }
};

// What is done as a CUDA thread, and how one is entered.
using Body = std::function<void()>;
using Enter = std::function<void(CudaThread&)>;

// Ends a thread of a wave that has failed.
struct Unwind {};

// What body() throws on its own account.
inline std::exception_ptr failure_of(const Body& body) {
  try {
    body();
  } catch (const Unwind&) {
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

class Wave {
 public:
  using Threads = std::vector<CudaThread*>;

  Wave(const Launch& launch, const std::vector<int64_t>& block_indices) : launch_(launch) {
    for (const int64_t index : block_indices) {
      blocks_.emplace_back(index, launch.shape);
      for (int thread = 0; thread < launch.shape.threads; ++thread) {
        threads_.push_back({this, &blocks_.back(), thread});
        threads_.back().copies = Copies(launch.seed + thread);
      }
    }
  }

  const Launch& launch() const { return launch_; }
  bool failed() const { return bool(error_); }
  void rethrow() const {
    if (error_) {
      std::rethrow_exception(error_);
    }
  }
  // The first failure counts.
  void fail(std::exception_ptr error) { error_ = error_ ? error_ : error; }

  Threads everybody() {
    Threads all;
    for (CudaThread& thread : threads_) {
      all.push_back(&thread);
    }
    return all;
  }

  Meeting& meeting(const CudaThread& thread, const Arrival& arrival) {
    switch (arrival.scope) {
      case Scope::kWarp:
        return thread.block->warps[thread.index / kWarp].meetings[std::countr_zero(arrival.mask)];
      case Scope::kBlock:
        return thread.block->meeting;
      default:
        return meeting_;
    }
  }

  // Those who go on, now that nobody runs; the wave has failed where they are to unwind. Nobody
  // where all have left.
  Threads next() {
    Threads released;
    if (!failed()) {
      release_complete(released);
      if (released.empty()) {
        find_failure();
      }
    }
    if (failed()) {
      for (CudaThread& thread : threads_) {
        if (thread.status == CudaThread::Status::kWaiting) {
          thread.status = CudaThread::Status::kRunning;
          released.push_back(&thread);
        }
      }
    }
    return released;
  }

 private:
  // Who has to come to a thread's meeting; null: a lane that does not exist. Until the next call.
  const Threads& invited(const CudaThread& thread) {
    const size_t size = launch_.shape.threads, at = &thread - threads_.data();
    Threads& all = invited_;
    all.clear();
    if (thread.arrival.scope == Scope::kWarp) {
      for (uint32_t lanes = thread.arrival.mask; lanes; lanes &= lanes - 1) {
        const size_t index = thread.index - thread.lane() + std::countr_zero(lanes);
        all.push_back(index < size ? &threads_[at - thread.index + index] : nullptr);
      }
      return all;
    }
    const bool grid = thread.arrival.scope == Scope::kGrid;
    const size_t begin = grid ? 0 : at / size * size, end = grid ? threads_.size() : begin + size;
    for (size_t i = begin; i < end; ++i) {
      all.push_back(&threads_[i]);
    }
    return all;
  }

  // One of the invited calls the others: who that is need not be right where not all have come.
  bool calls(const CudaThread& thread) const {
    switch (thread.arrival.scope) {
      case Scope::kWarp:
        return thread.lane() == std::countr_zero(thread.arrival.mask);
      case Scope::kBlock:
        return thread.index == 0;
      default:
        return &thread == &threads_[0];
    }
  }

  void release_complete(Threads& released) {
    for (CudaThread& thread : threads_) {
      if (thread.status != CudaThread::Status::kWaiting || !calls(thread)) {
        continue;
      }
      const Threads& all = invited(thread);
      if (!missing(thread, all)) {
        exchange(thread, all);
        ++meeting(thread, thread.arrival).held;
        for (CudaThread* other : all) {
          other->status = CudaThread::Status::kRunning;
        }
        released.insert(released.end(), all.begin(), all.end());
      }
    }
  }

  // The place in the list of one who has not come.
  static CudaThread* const* missing(const CudaThread& thread, const Threads& all) {
    for (CudaThread* const& other : all) {
      if (!other || !other->waits_with(thread)) {
        return &other;
      }
    }
    return nullptr;
  }

  static void exchange(const CudaThread& caller, const Threads& all) {
    if (caller.arrival.scope != Scope::kWarp) {
      return;
    }
    uint64_t values[kWarp], ballot = 0;
    for (const CudaThread* thread : all) {
      values[thread->lane()] = thread->arrival.value;
      ballot |= uint64_t(thread->arrival.value != 0) << thread->lane();
    }
    for (CudaThread* thread : all) {
      thread->result = thread->arrival.source < 0 ? ballot : values[thread->arrival.source];
    }
  }

  // Warps first: a warp that is stuck keeps its block waiting, which is not the block's fault.
  void find_failure() {
    for (const Scope scope : {Scope::kWarp, Scope::kBlock, Scope::kGrid}) {
      for (const CudaThread& thread : threads_) {
        if (thread.waits(scope)) {
          return fail(std::make_exception_ptr(launch_.error(reason(thread))));
        }
      }
    }
  }

  std::string reason(const CudaThread& thread) {
    const Threads& all = invited(thread);
    const CudaThread* const* absent = missing(thread, all);
    const std::string waits = thread.name() + " " + thread.state() + ", but ";
    return *absent ? waits + (*absent)->name() + " " + (*absent)->state()
                   : waits + "its mask names lanes that the block does not have";
  }

  Launch launch_;
  std::deque<Block> blocks_;  // stays where it is
  std::vector<CudaThread> threads_;
  Threads invited_;
  Meeting meeting_;
  std::exception_ptr error_;
};

inline constinit thread_local CudaThread* current = nullptr;

}  // namespace fastres::cuda::emulation
