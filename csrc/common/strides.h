// How the glue tells in which order the elements of tensors lie in memory.
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

// Of a 4-D tensor, torch's suggest_memory_format: strides ascend in the order channel, column, row, batch; where the
// order is ambiguous, as in N x C x 1 x 1, NCHW wins.
inline bool is_channels_last(const Tensor& t) {
  int64_t least = 0;
  if (t.stride(1) == 0) return false;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least || (d == 0 && least == t.stride(1))) return false;
    least = t.stride(d) * t.size(d);
  }
  return true;
}

}  // namespace fastnn
