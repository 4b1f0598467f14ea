// Memory for tensors and scratch that keeps its pages: what is freed is handed out again without
// a visit to the kernel and without page faults.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastres::cpu {

struct MemoryStats {
  int64_t live, cached, peak_live, hits, misses;
};

// A block of at least `bytes` bytes, aligned to 64 bytes (2 MiB from 1 MiB on). Null where the
// system has no memory left. Any thread may free what another allocated.
struct Block;
Block* allocate(size_t bytes);
void release(Block* block);
void* address(const Block* block);

MemoryStats memory_stats();
void trim_cache();
void set_cache_limit(size_t bytes);
void set_poison(bool on);

// Throws std::bad_alloc.
Block* allocate_or_throw(size_t bytes);

}  // namespace fastres::cpu
