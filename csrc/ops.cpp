// Every operator's schema. The kernels register themselves: csrc/cpu/<op>.cpp, csrc/cuda/<op>.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastnn, m) {
  m.def("relu(Tensor self) -> Tensor");
  m.def("relu_(Tensor(a!) self) -> ()");
  m.def("relu_backward(Tensor grad_output, Tensor result) -> Tensor");

  // code: uint8, which element of its window each output is, row by row; 255 where a window has none.
  m.def(
      "max_pool2d(Tensor self, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode) "
      "-> (Tensor output, Tensor code)");
  // input_size: height and width of what was pooled.
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor code, SymInt[] input_size, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation) -> Tensor grad_input");

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
  // stats, in the accumulation dtype, is (3 * rows + 1,), a row being one element of the unreduced loss: every row's
  // maximum logit, then its sum of e^(logit - maximum), then the total weight of its target, 0 where it is ignored; and
  // the total weight that 'mean' divides by.
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing) -> (Tensor output, Tensor stats)");
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor stats, "
      "int reduction, int ignore_index, float label_smoothing) -> Tensor grad_input");
  // One optimizer step of every parameter, in place, the state_steps (float32 or float64 scalars) included. Gradients
  // are divided by grad_scale, in place, where it is given. max_exp_avg_sqs: empty without amsgrad. Of CUDA tensors, lr
  // and grad_scale may be numbers in device memory, and if found_inf is not 0 there, nothing is changed.
  m.def(
      "adam_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
      "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, float lr, float beta1, float beta2, "
      "float weight_decay, float eps, bool amsgrad, bool maximize, bool decoupled_weight_decay, "
      "float? grad_scale=None, Tensor? lr_tensor=None, Tensor? grad_scale_tensor=None, Tensor? found_inf=None) -> ()");
  // momentum_buffer_list: empty where momentum is 0. first_steps: indices of the parameters whose buffer is written
  // without being read. lr_in_velocity: the buffer holds -lr times what it holds otherwise. Of CUDA tensors, a buffer
  // of -0 is one that no step has written.
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffer_list, int[] first_steps, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool lr_in_velocity, "
      "float? grad_scale=None, Tensor? lr_tensor=None, Tensor? grad_scale_tensor=None, Tensor? found_inf=None) -> ()");
}
