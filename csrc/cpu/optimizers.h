// How the optimizers' operators take numbers that are tensors.
#pragma once

#include <optional>

#include "common/check.h"
#include "cpu/bindings.h"

namespace fastnn::cpu {

// `lr`, or the number in `lr_tensor`, which a compiled step reads as it runs. The other tensors are for kernels that
// must not wait for them.
inline double learning_rate(const char* op, double lr, const std::optional<Tensor>& lr_tensor,
                            const std::optional<Tensor>& grad_scale_tensor, const std::optional<Tensor>& found_inf) {
  STD_TORCH_CHECK(!grad_scale_tensor && !found_inf, op,
                  ": grad_scale_tensor and found_inf are for CUDA tensors, expected None");
  if (!lr_tensor) return lr;
  const bool is_double = lr_tensor->scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      lr_tensor->is_cpu() && lr_tensor->numel() == 1 && (is_double || lr_tensor->scalar_type() == ScalarType::Float),
      op, ": lr_tensor must be a float32 or float64 tensor of one element on the CPU");
  return is_double ? *static_cast<const double*>(lr_tensor->data_ptr())
                   : *static_cast<const float*>(lr_tensor->data_ptr());
}

}  // namespace fastnn::cpu
