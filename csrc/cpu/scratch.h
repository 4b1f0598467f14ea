// An array that lives as long as a call.
#pragma once

#include "cpu/allocator.h"
#include "cpu/simd.h"

namespace fastres::cpu::FASTRES_ISA {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : block_(allocate_or_throw(size_t(count) * sizeof(T))) {}
  ~Scratch() { release(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return static_cast<T*>(address(block_)); }

 private:
  Block* block_;
};

}  // namespace fastres::cpu::FASTRES_ISA
