// How the glue of elementwise kernels tells whether tensors can be walked in storage order, side by side.
#pragma once

#include "common/check.h"

namespace fastnn {

// Whether the elements fill a block of memory without gaps or overlaps, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t dims = sizes.size();
  int64_t expected = 1;
  // Strides of a dense tensor, sorted, are the running products of the sizes; torch has at most 64 dimensions.
  uint64_t used = 0;
  for (size_t step = 0; step < dims; ++step) {
    size_t found = dims;
    for (size_t d = 0; d < dims; ++d)
      if (!(used >> d & 1) && (sizes[d] == 1 || strides[d] == expected)) {
        found = d;
        if (sizes[d] != 1) break;
      }
    if (found == dims) return false;
    used |= uint64_t(1) << found;
    expected *= sizes[found];
  }
  return true;
}

// For tensors of one shape: if one is dense, both are, and in the same order.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a_strides[d] != b_strides[d]) return false;
  return true;
}

}  // namespace fastnn
