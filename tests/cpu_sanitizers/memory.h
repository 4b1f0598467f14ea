// Scratch memory in allocations of exactly its size, and small integers; for one source file.
#pragma once

#include <cstdlib>
#include <vector>

#include "cpu/allocator.h"
#include "fastres/dtype.h"

namespace fastres::cpu {

struct Block {
  void* memory;
};

Block* allocate_or_throw(size_t bytes) { return new Block{std::malloc(bytes)}; }
void release(Block* block) {
  std::free(block->memory);
  delete block;
}
void* address(const Block* block) { return block->memory; }

template <class T>
std::vector<T> integers(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) {
    value = FromAcc<T>::convert(Acc<T>(std::rand() % 7 - 3));
  }
  return values;
}

}  // namespace fastres::cpu
