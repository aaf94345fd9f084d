// Glue of fastnn::relu, relu_ and relu_backward on CUDA devices.
#include "cuda/kernels/relu.h"

#include "common/check.h"
#include "common/strides.h"
#include "cuda/device.h"

namespace fastnn::cuda {
namespace {

// The tensor where its elements lie in the order of `order`'s, which is dense; else a copy that does.
Tensor ordered_like(const Tensor& order, const Tensor& tensor) {
  if (is_dense(tensor) && same_strides(tensor, order)) return tensor;
  Tensor copy = torch::stable::empty_like(order);
  torch::stable::copy_(copy, tensor);
  return copy;
}

void forward_into(const char* op, const Tensor& x, const Tensor& y) {
  const DeviceOf device(x);
  check_launch(op, launch_relu(dtype_of(x, op, "self"), x.data_ptr(), y.data_ptr(), x.numel(), device.stream()));
}

Tensor relu(Tensor self) {
  dtype_of(self, "relu", "self");
  const Tensor out = torch::stable::empty_like(self);
  forward_into("relu", ordered_like(out, self), out);
  return out;
}

void relu_(Tensor self) {
  dtype_of(self, "relu_", "self");
  if (is_dense(self)) return forward_into("relu_", self, self);
  torch::stable::copy_(self, relu(self));
}

Tensor relu_backward(Tensor grad_output, Tensor result) {
  const char* op = "relu_backward";
  check_same_device(grad_output, result, op, "grad_output");
  check_same_dtype(grad_output, result, op, "grad_output");
  check_same_shape(grad_output, result, op, "grad_output");
  const DType dtype = dtype_of(result, op, "result");
  const DeviceOf device(result);
  const Tensor grad_input = torch::stable::empty_like(result);
  const Tensor g = ordered_like(grad_input, grad_output), y = ordered_like(grad_input, result);
  check_launch(op, launch_relu_backward(dtype, g.data_ptr(), y.data_ptr(), grad_input.data_ptr(), result.numel(),
                                        device.stream()));
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("relu", TORCH_BOX(&relu));
  m.impl("relu_", TORCH_BOX(&relu_));
  m.impl("relu_backward", TORCH_BOX(&relu_backward));
}

}  // namespace fastnn::cuda
