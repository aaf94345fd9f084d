// What the CPU glue shares: output memory and scratch memory.
#pragma once

#include <array>
#include <cstdlib>
#include <memory>
#include <optional>

#include "common/check.h"

namespace fastnn::cpu {

// A fresh large allocation costs a page fault every 4 KiB, more than the kernel that fills it; asking for 2 MiB pages
// first removes most of them. Returns its argument.
Tensor with_huge_pages(Tensor tensor);

// As torch's empty_strided and, for a contiguous tensor, empty; past the dispatcher, which costs a small call more than
// its kernel does.
Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes, torch::headeronly::IntHeaderOnlyArrayRef strides,
                     ScalarType dtype);
Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype);
// Of any strides, kept where they are dense.
Tensor fresh_like(const Tensor& tensor);

// NCHW or channels_last, with huge pages; dtype: that of `like`, unless given.
Tensor empty_4d(const Tensor& like, std::array<int64_t, 4> sizes, bool channels_last,
                std::optional<ScalarType> dtype = std::nullopt);

// Uninitialised memory for free(), with huge pages: `bytes` and a cache line more from its next cache line on.
void* allocate_scratch(size_t bytes);

// Uninitialised scratch of one thread, aligned to a cache line. By hand: aligned_alloc takes malloc's slow path.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(allocate_scratch(size_t(count) * sizeof(T))) {}
  T* get() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) | 63) + 1); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
};

}  // namespace fastnn::cpu
