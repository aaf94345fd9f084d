// Interface of the CPU Adam kernels: a slice of one parameter, a table entry per dtype.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastnn::cpu {

struct AdamOptions {
  double lr, beta1, beta2, weight_decay, eps;
  bool maximize, decoupled_weight_decay;
  bool scaled;  // gradients are divided by grad_scale and written back
  double grad_scale;
};

// What depends on the parameter's own step count t.
struct AdamBias {
  double step_size;              // lr / (1 - beta1^t)
  double bias_correction2_sqrt;  // sqrt(1 - beta2^t)
};

struct AdamKernels {
  // data: param, grad, exp_avg, exp_avg_sq and, for amsgrad, max_exp_avg_sq.
  void (*update[kNumDTypes])(const AdamOptions& options, const AdamBias& bias, void* const* data, int64_t count);
  void (*update_amsgrad[kNumDTypes])(const AdamOptions& options, const AdamBias& bias, void* const* data,
                                     int64_t count);
};

const AdamKernels& adam_kernels();

}  // namespace fastnn::cpu
