#include "cpu/memory.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/strides.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastnn::cpu {

namespace {

constexpr uintptr_t kHugePage = 2 << 20;

// Of what is worth it. Advice only: where the kernel does not take it, nothing is lost.
void advise_huge_pages(void* data, uintptr_t bytes) {
#if defined(__linux__)
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

}  // namespace

Tensor with_huge_pages(Tensor tensor) {
  advise_huge_pages(tensor.data_ptr(), uintptr_t(tensor.numel()) * tensor.element_size());
  return tensor;
}

void* allocate_scratch(size_t bytes) {
  void* const data = std::malloc(bytes + 128);
  if (!data) throw std::runtime_error("can't allocate memory: " + std::to_string(bytes) + " bytes of scratch");
  advise_huge_pages(data, bytes);
  return data;
}

Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes, torch::headeronly::IntHeaderOnlyArrayRef strides,
                     ScalarType dtype) {
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype_code,
                               aoti_torch_device_type_cpu(), 0, &handle) != TORCH_SUCCESS)
    throw std::runtime_error("can't allocate memory for a CPU tensor of shape " + shape_string(sizes) + " and dtype " +
                             torch::headeronly::toString(dtype));
  return Tensor(handle);
}

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return empty_strided(sizes, strides, dtype);
}

Tensor empty_4d(const Tensor& like, std::array<int64_t, 4> sizes, bool channels_last, std::optional<ScalarType> dtype) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (int64_t d : channels_last ? std::array<int64_t, 4>{1, 3, 2, 0} : std::array<int64_t, 4>{3, 2, 1, 0}) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return with_huge_pages(empty_strided({sizes.data(), 4}, {strides.data(), 4}, dtype.value_or(like.scalar_type())));
}

Tensor fresh_like(const Tensor& tensor) {
  if (!is_dense(tensor)) return torch::stable::empty_like(tensor);
  return empty_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type());
}

}  // namespace fastnn::cpu
