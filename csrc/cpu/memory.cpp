#include "cpu/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastnn::cpu {

Tensor with_huge_pages(Tensor tensor) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t bytes = uintptr_t(tensor.numel()) * tensor.element_size();
  if (bytes >= 2 * kHugePage) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    // Advice only: where the kernel does not take it, nothing is lost.
    madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

}  // namespace fastnn::cpu
