// Argument checks of the glue, CPU and CUDA alike. The Python layer sends what the kernels do not cover to native
// torch, so these only speak to callers of the raw torch.ops.fastnn operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "common/dtype.h"

namespace fastnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string text = "[";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}
inline std::string shape_string(const Tensor& tensor) { return shape_string(tensor.sizes()); }

inline DType dtype_of(const Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                      ", expected float64, float32, bfloat16 or float16");
  }
}

inline void check_same_dtype(const Tensor& tensor, const Tensor& reference, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == reference.scalar_type(), op, ": ", name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected ",
                  torch::headeronly::toString(reference.scalar_type()));
}

inline void check_same_device(const Tensor& tensor, const Tensor& reference, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.device() == reference.device(), op, ": ", name, " is on another device than ",
                  "the other arguments");
}

inline void check_same_shape(const Tensor& tensor, const Tensor& reference, const char* op, const char* name) {
  bool same = tensor.dim() == reference.dim();
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == reference.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " has shape ", shape_string(tensor), ", expected ", shape_string(reference));
}

inline void check_dim(const Tensor& tensor, int64_t dim, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dim, op, ": ", name, " has shape ", shape_string(tensor), ", expected ", dim,
                  " dimensions");
}

}  // namespace fastnn
