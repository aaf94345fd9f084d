// Interface of the CPU SGD kernels: a slice of one parameter, a table entry per dtype.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastnn::cpu {

enum class Momentum : int { kNone, kFirstStep, kOn };

struct SgdOptions {
  // p += step_factor * (what the gradients, times grad_factor, accumulate to): (1, -lr), or (-lr, 1) where the learning
  // rate is in the velocity.
  double grad_factor, step_factor;
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool scaled;  // gradients are divided by grad_scale and written back
  double grad_scale;
};

struct SgdKernels {
  // data: param, grad and, with momentum, momentum_buffer.
  void (*update[kNumDTypes])(const SgdOptions& options, Momentum mode, void* const* data, int64_t count);
};

const SgdKernels& sgd_kernels();

}  // namespace fastnn::cpu
