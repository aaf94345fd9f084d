// Launchers of the CUDA Adam kernels.
#pragma once

#include <vector>

#include "cuda/kernels/tensor_list.h"

namespace fastnn::cuda {

struct AdamOptions {
  Scalar lr;
  double beta1, beta2, weight_decay, eps;
  bool amsgrad, maximize, decoupled_weight_decay;
  bool scaled;  // gradients are divided by grad_scale and written back
  Scalar grad_scale;
  Scalar found_inf;  // anything but 0: nothing is changed
};

// What depends on a parameter's own step count t.
struct AdamBias {
  double step_size;              // lr / (1 - beta1^t)
  double bias_correction2_sqrt;  // sqrt(1 - beta2^t)
  double decay;                  // 1 - lr weight_decay
};

// A step counter in device memory, to be advanced, or the value of one that the host has advanced.
using AdamStep = Scalar;

// Fills in biases[i] for steps[i], and advances the steps in device memory.
cudaError_t launch_adam_steps(const AdamOptions& options, const std::vector<AdamStep>& steps, AdamBias* biases,
                              cudaStream_t stream);

// Operands: param, grad, exp_avg, exp_avg_sq and, for amsgrad, max_exp_avg_sq. A tensor's number is that of its bias.
cudaError_t launch_adam(const AdamOptions& options, const TensorList& list, const AdamBias* biases,
                        cudaStream_t stream);

}  // namespace fastnn::cuda
