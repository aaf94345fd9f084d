// Every operator's schema. The kernels register themselves: csrc/cpu/<op>.cpp, csrc/cuda/<op>.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastnn, m) {
  m.def("relu(Tensor self) -> Tensor");
  m.def("relu_(Tensor(a!) self) -> ()");
  m.def("relu_backward(Tensor grad_output, Tensor result) -> Tensor");

  // padding is (top, left, bottom, right); relu applies max(0, .) to the result.
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
      "bool relu) -> Tensor");
  // code: uint8, which element of its window each output is, row by row; 255 where ReLU zeroed the output.
  m.def(
      "conv2d_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
      "int groups, int[] pool_kernel_size, int[] pool_stride) -> (Tensor output, Tensor code)");
  // Gradients of input, weight and bias; one that output_mask leaves out is an empty tensor. relu_output: the result,
  // where ReLU was applied. pool_code: what conv2d_relu_max_pool2d returned, and grad_output is then the pooled one's.
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? relu_output, Tensor? pool_code, "
      "int[] stride, int[] padding, int[] dilation, int groups, int[] pool_kernel_size, int[] pool_stride, "
      "bool[] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // target: class indices (int64 or uint8), or probabilities like the input. reduction: 0 none, 1 mean, 2 sum.
  // row_stats, in the accumulation dtype, is (3, rows), a row being one element of the unreduced loss: the logits'
  // maximum, the sum of e^(logit - maximum), and the total weight of the target, 0 where it is ignored. total_weight is
  // what 'mean' divides by.
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing) -> (Tensor output, Tensor row_stats, Tensor total_weight)");
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor row_stats, "
      "Tensor total_weight, int reduction, int ignore_index, float label_smoothing) -> Tensor grad_input");
}
