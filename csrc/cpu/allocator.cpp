#include "cpu/allocator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include <pthread.h>
#include <sys/mman.h>

namespace fastres::cpu {

struct Block {
  char* address;
  size_t size;
  bool in_arena;
};

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kLarge = size_t(1) << 20;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kLargestArena = size_t(1) << 40;
constexpr size_t kSmallestArena = size_t(1) << 30;

constexpr size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// One range of addresses, reserved once and filled from the bottom. A free range is joined with
// its free neighbours, and a request takes the lowest range that holds it: what the process keeps
// is close to the most it ever had in use, whatever mixture of sizes comes and goes.
class Arena {
 public:
  Arena() {
    // Address space may be limited (ulimit -v), so ask for less until it is granted.
    for (size_t wanted = kLargestArena; wanted >= kSmallestArena; wanted /= 2) {
      constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* mapping = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, kFlags, -1, 0);
      if (mapping != MAP_FAILED) {
        place(static_cast<char*>(mapping), wanted);
        return;
      }
    }
  }

  // Null where the arena is full; `reused` tells whether the pages were there already.
  char* take(size_t size, bool* reused) {
    for (auto range = free_.begin(); range != free_.end(); ++range) {
      if (range->second.size >= size) {
        *reused = range->second.resident >= size;
        return base_ + cut(range, size);
      }
    }
    *reused = false;
    const size_t begin = tail();
    if (size > capacity_ - begin) {
      return nullptr;
    }
    if (begin < top_) {
      const auto last = std::prev(free_.end());
      resident_ -= last->second.resident;
      free_.erase(last);
    }
    top_ = begin + size;
    return base_ + begin;
  }

  void give_back(char* address, size_t size) {
    size_t offset = size_t(address - base_);
    Range range{size, size};
    size_t before = 0;  // what is counted already of the ranges that are joined
    const auto next = free_.lower_bound(offset);
    if (next != free_.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second.size == offset) {
        offset = previous->first;
        before += previous->second.resident;
        range = previous->second.then(range);
        free_.erase(previous);
      }
    }
    if (next != free_.end() && next->first == size_t(address - base_) + size) {
      before += next->second.resident;
      range = range.then(next->second);
      free_.erase(next);
    }
    free_[offset] = range;
    resident_ += range.resident - before;
  }

  size_t resident() const { return resident_; }

  // Returns pages of free ranges to the system, highest addresses first, down to `allowed` bytes.
  void shrink(size_t allowed) {
    for (auto range = free_.rbegin(); range != free_.rend() && resident_ > allowed; ++range) {
      Range& r = range->second;
      const size_t excess = std::min(resident_ - allowed, r.resident);
      const size_t kept = (r.resident - excess) / kHugePage * kHugePage;
      madvise(base_ + range->first + kept, r.size - kept, MADV_DONTNEED);
      resident_ -= r.resident - kept;
      r.resident = kept;
    }
  }

 private:
  // At most the first `resident` bytes of a free range still have their pages.
  struct Range {
    size_t size, resident;

    // The range that begins with this one and goes on with `next`.
    Range then(const Range& next) const {
      return {size + next.size, next.resident > 0 ? size + next.resident : resident};
    }
  };

  void place(char* mapping, size_t size) {
    base_ = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(mapping), kHugePage));
    capacity_ = (size - size_t(base_ - mapping)) / kHugePage * kHugePage;
#ifdef MADV_HUGEPAGE
    madvise(base_, capacity_, MADV_HUGEPAGE);
#endif
#ifdef MADV_DONTDUMP
    madvise(base_, capacity_, MADV_DONTDUMP);  // a core dump would hold every activation
#endif
  }

  // Where the free memory at the end begins: a free range that ends there, or what was never used.
  size_t tail() const {
    if (free_.empty()) {
      return top_;
    }
    const auto last = std::prev(free_.end());
    return last->first + last->second.size == top_ ? last->first : top_;
  }

  size_t cut(std::map<size_t, Range>::iterator range, size_t size) {
    const size_t offset = range->first;
    const size_t warm = std::min(range->second.resident, size);
    const Range rest{range->second.size - size, range->second.resident - warm};
    resident_ -= warm;
    free_.erase(range);
    if (rest.size > 0) {
      free_[offset + size] = rest;
    }
    return offset;
  }

  char* base_ = nullptr;
  size_t capacity_ = 0, top_ = 0, resident_ = 0;
  std::map<size_t, Range> free_;
};

class Cache {
 public:
  Cache() {
    if (const char* value = getenv("FASTRES_CPU_CACHE_MB")) {
      limit_ = size_t(strtoull(value, nullptr, 10)) << 20;
    }
    if (const char* value = getenv("FASTRES_POISON")) {
      poison_ = *value != '\0' && strcmp(value, "0") != 0;
    }
  }

  Block* allocate(size_t bytes) {
    Block* block = bytes >= kLarge ? large(bytes) : small(bytes);
    if (block && poison_) {
      memset(block->address, 0xff, block->size);
    }
    return block;
  }

  void release(Block* block) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      live_ -= block->size;
      if (block->in_arena) {
        arena_.give_back(block->address, block->size);
        arena_.shrink(limit_);
      }
    }
    if (!block->in_arena) {
      free(block->address);
    }
    delete block;
  }

  void trim() {
    std::lock_guard<std::mutex> lock(mutex_);
    arena_.shrink(0);
  }

  void set_limit(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    arena_.shrink(limit_);
  }

  void set_poison(bool on) {
    std::lock_guard<std::mutex> lock(mutex_);
    poison_ = on;
  }

  MemoryStats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {int64_t(live_), int64_t(arena_.resident()), int64_t(peak_live_), hits_, misses_};
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  Block* large(size_t bytes) {
    if (bytes > kLargestArena) {
      return nullptr;
    }
    const size_t size = round_up(bytes, kHugePage);
    std::lock_guard<std::mutex> lock(mutex_);
    bool reused = false;
    char* address = arena_.take(size, &reused);
    ++(reused ? hits_ : misses_);
    return address ? count(new (std::nothrow) Block{address, size, true}) : nullptr;
  }

  Block* small(size_t bytes) {
    const size_t size = round_up(std::max<size_t>(bytes, 1), kAlignment);
    void* address = nullptr;
    if (posix_memalign(&address, kAlignment, size) != 0) {
      return nullptr;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    return count(new (std::nothrow) Block{static_cast<char*>(address), size, false});
  }

  Block* count(Block* block) {
    if (block) {
      live_ += block->size;
      peak_live_ = std::max(peak_live_, live_);
    }
    return block;
  }

  std::mutex mutex_;
  Arena arena_;
  size_t live_ = 0, peak_live_ = 0;
  size_t limit_ = SIZE_MAX;
  int64_t hits_ = 0, misses_ = 0;
  bool poison_ = false;
};

// Never destroyed: tensors may outlive every static object.
Cache& cache() {
  static Cache* const instance = [] {
    Cache* made = new Cache;
    pthread_atfork([] { cache().lock(); }, [] { cache().unlock(); }, [] { cache().unlock(); });
    return made;
  }();
  return *instance;
}

}  // namespace

Block* allocate(size_t bytes) { return cache().allocate(bytes); }

Block* allocate_or_throw(size_t bytes) {
  Block* block = allocate(bytes);
  if (!block) {
    throw std::bad_alloc();
  }
  return block;
}

void release(Block* block) { cache().release(block); }
void* address(const Block* block) { return block->address; }
MemoryStats memory_stats() { return cache().stats(); }
void trim_cache() { cache().trim(); }
void set_cache_limit(size_t bytes) { cache().set_limit(bytes); }
void set_poison(bool on) { cache().set_poison(on); }

}  // namespace fastres::cpu
