#include "cpu/allocator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>

namespace fastres::cpu {

struct Block {
  void* address;
  size_t size;    // of its size class
  void* mapping;  // what munmap takes; null for a block of malloc's
  size_t mapped;
  Block* older;  // neighbours in the list of free blocks, by the time they were freed
  Block* newer;
};

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kLarge = size_t(1) << 20;
constexpr size_t kHugePage = size_t(2) << 20;

constexpr size_t round_up(size_t value, size_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Eight steps per power of two waste at most an eighth; large blocks are whole huge pages.
size_t size_class(size_t bytes) {
  if (bytes <= 8 * kAlignment) {
    return std::max(kAlignment, round_up(bytes, kAlignment));
  }
  size_t power = kAlignment;
  while (power < bytes / 16 + 1) {
    power *= 2;
  }
  const size_t rounded = round_up(bytes, power);
  return rounded >= kLarge ? round_up(rounded, kHugePage) : rounded;
}

Block* map_large(size_t size) {
  // Mapped with room to spare, then cut to a boundary, since mmap aligns to small pages only.
  const size_t wanted = size + kHugePage;
  void* mapping = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) {
    return nullptr;
  }
  char* begin = static_cast<char*>(mapping);
  char* aligned = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(begin), kHugePage));
  if (aligned > begin) {
    munmap(begin, size_t(aligned - begin));
  }
  if (aligned + size < begin + wanted) {
    munmap(aligned + size, size_t(begin + wanted - (aligned + size)));
  }
#ifdef MADV_HUGEPAGE
  madvise(aligned, size, MADV_HUGEPAGE);
#endif
  return new (std::nothrow) Block{aligned, size, aligned, size, nullptr, nullptr};
}

Block* new_block(size_t size) {
  if (size >= kLarge) {
    return map_large(size);
  }
  void* address = nullptr;
  if (posix_memalign(&address, kAlignment, size) != 0) {
    return nullptr;
  }
  return new (std::nothrow) Block{address, size, nullptr, 0, nullptr, nullptr};
}

void delete_block(Block* block) {
  if (block->mapping) {
    munmap(block->mapping, block->mapped);
  } else {
    free(block->address);
  }
  delete block;
}

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
    if (bytes > (size_t(1) << 62)) {
      return nullptr;
    }
    const size_t size = size_class(bytes);
    Block* block = take(size);
    if (!block) {
      block = new_block(size);
    }
    if (!block) {  // the cache itself may be what is in the way
      trim();
      block = new_block(size);
    }
    if (!block) {
      return nullptr;
    }
    bool poison;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      live_ += size;
      peak_live_ = std::max(peak_live_, live_);
      poison = poison_;
    }
    if (poison) {
      memset(block->address, 0xff, size);
    }
    return block;
  }

  void release(Block* block) {
    std::vector<Block*> dropped;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      live_ -= block->size;
      cached_ += block->size;
      append(block);
      free_[block->size].push_back(block);
      shrink(std::min(limit_, peak_live_), dropped);
    }
    destroy(dropped);
  }

  void trim() {
    std::vector<Block*> dropped;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      shrink(0, dropped);
    }
    destroy(dropped);
  }

  void set_limit(size_t bytes) {
    std::vector<Block*> dropped;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      limit_ = bytes;
      shrink(std::min(limit_, peak_live_), dropped);
    }
    destroy(dropped);
  }

  void set_poison(bool on) {
    std::lock_guard<std::mutex> lock(mutex_);
    poison_ = on;
  }

  MemoryStats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {int64_t(live_), int64_t(cached_), int64_t(peak_live_), hits_, misses_};
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // The block of this class that was freed last: the likeliest to be in the CPU's cache still.
  Block* take(size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = free_.find(size);
    if (found == free_.end() || found->second.empty()) {
      ++misses_;
      return nullptr;
    }
    Block* block = found->second.back();
    found->second.pop_back();
    unlink(block);
    cached_ -= size;
    ++hits_;
    return block;
  }

  void append(Block* block) {
    block->older = newest_;
    block->newer = nullptr;
    (newest_ ? newest_->newer : oldest_) = block;
    newest_ = block;
  }

  void unlink(Block* block) {
    (block->older ? block->older->newer : oldest_) = block->newer;
    (block->newer ? block->newer->older : newest_) = block->older;
  }

  // Takes the blocks that have been free longest out of the cache, until `allowed` bytes are left.
  void shrink(size_t allowed, std::vector<Block*>& dropped) {
    while (cached_ > allowed) {
      Block* block = oldest_;
      unlink(block);
      std::vector<Block*>& same_size = free_[block->size];
      same_size.erase(std::find(same_size.begin(), same_size.end(), block));
      cached_ -= block->size;
      dropped.push_back(block);
    }
  }

  // Outside the lock: unmapping a large block takes its time.
  static void destroy(const std::vector<Block*>& blocks) {
    for (Block* block : blocks) {
      delete_block(block);
    }
  }

  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<Block*>> free_;
  Block* oldest_ = nullptr;
  Block* newest_ = nullptr;
  size_t live_ = 0, cached_ = 0, peak_live_ = 0;
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

Block* allocate(size_t bytes) {
  return cache().allocate(bytes);
}

Block* allocate_or_throw(size_t bytes) {
  Block* block = allocate(bytes);
  if (!block) {
    throw std::bad_alloc();
  }
  return block;
}

void release(Block* block) {
  cache().release(block);
}
void* address(const Block* block) {
  return block->address;
}
MemoryStats memory_stats() {
  return cache().stats();
}
void trim_cache() {
  cache().trim();
}
void set_cache_limit(size_t bytes) {
  cache().set_limit(bytes);
}
void set_poison(bool on) {
  cache().set_poison(on);
}

}  // namespace fastres::cpu
