// What the optimizers' operators refuse.
#pragma once

#include <optional>

#include "common/check.h"
#include "cpu/bindings.h"

namespace fastnn::cpu {

// The operators' tensors in place of numbers are for kernels that must not wait for them.
inline void check_numbers(const char* op, const std::optional<Tensor>& lr_tensor,
                          const std::optional<Tensor>& grad_scale_tensor, const std::optional<Tensor>& found_inf) {
  STD_TORCH_CHECK(!lr_tensor && !grad_scale_tensor && !found_inf, op,
                  ": lr_tensor, grad_scale_tensor and found_inf are for CUDA tensors, expected None");
}

}  // namespace fastnn::cpu
