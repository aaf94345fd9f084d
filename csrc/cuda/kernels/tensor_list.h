// What the optimizers' launchers take: numbers and lists of tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace fastnn::cuda {

// A number that the host knows, or one in device memory.
struct Scalar {
  double value;
  void* data;  // null: value
  DType dtype;
};

// Tensors of one dtype, the elements of each in the same order in every operand.
struct TensorList {
  DType dtype;
  std::vector<void*> data;  // the operands of the first tensor, then of the second, ..
  std::vector<int64_t> counts;
  std::vector<unsigned> numbers;  // in the caller's lists
};

}  // namespace fastnn::cuda
