// Interface of the CPU ReLU kernels: elementwise over `count` contiguous elements, a table entry per dtype.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastnn::cpu {

struct ReluKernels {
  // y = x < 0 ? 0 : x. x and y may be the same memory.
  void (*forward[kNumDTypes])(const void* x, void* y, int64_t count);
  // grad_x = grad_y where not (y <= 0), else 0.
  void (*backward[kNumDTypes])(const void* grad_y, const void* y, void* grad_x, int64_t count);
};

const ReluKernels& relu_kernels();

}  // namespace fastnn::cpu
