// Launcher of the CUDA SGD kernels.
#pragma once

#include "cuda/kernels/tensor_list.h"

namespace fastnn::cuda {

enum class Momentum : int { kNone, kFirstStep, kOn };

struct SgdOptions {
  Scalar lr;
  double momentum, dampening, weight_decay;
  bool nesterov, maximize, lr_in_velocity;
  bool scaled;  // gradients are divided by grad_scale and written back
  Scalar grad_scale;
  Scalar found_inf;  // anything but 0: nothing is changed
};

// Operands: param, grad and, with momentum, momentum_buffer. All the list's tensors are in one mode.
cudaError_t launch_sgd(const SgdOptions& options, Momentum mode, const TensorList& list, cudaStream_t stream);

}  // namespace fastnn::cuda
