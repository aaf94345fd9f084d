// Glue of fastnn::cross_entropy and cross_entropy_backward on CUDA devices.
#include <tuple>

#include "common/cross_entropy_call.h"
#include "cuda/device.h"
#include "cuda/kernels/cross_entropy.h"

namespace fastnn::cuda {
namespace {

// Behind the rows' own.
void* total_weight_of(const Tensor& stats) {
  return static_cast<char*>(stats.data_ptr()) + (stats.numel() - 1) * stats.element_size();
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t reduction,
                                         int64_t ignore_index, double label_smoothing) {
  const char* op = "cross_entropy";
  CrossEntropyCall call = cross_entropy_call(op, input, target, weight, reduction, ignore_index, label_smoothing);
  auto& args = call.args;
  const DeviceOf device(input);
  const DType dtype = dtype_of(input, op, "input");
  const ScalarType accumulator = accumulator_dtype(input);
  const Tensor stats = torch::stable::new_empty(input, {3 * args.rows + 1}, accumulator);
  const Tensor losses = torch::stable::new_empty(input, loss_shape(input), accumulator);
  const Tensor scratch = torch::stable::new_empty(input, {cross_entropy_scratch_bytes(dtype, args)}, ScalarType::Byte);
  args.row_stats = stats.data_ptr();
  args.loss = losses.data_ptr();
  if (args.rows > 0) {
    choose_layout(call);
    check_launch(op, launch_cross_entropy(dtype, args, call.layout, scratch.data_ptr(), device.stream()));
  }
  Tensor output = reduction == kNone ? losses : torch::stable::new_empty(input, {}, input.scalar_type());
  check_launch(op,
               launch_cross_entropy_total(dtype, args, Reduction(reduction), scratch.data_ptr(), total_weight_of(stats),
                                          reduction == kNone ? nullptr : output.data_ptr(), device.stream()));
  return {contiguous_as(output, input.scalar_type()), stats};
}

Tensor cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, std::optional<Tensor> weight,
                              Tensor stats, int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const char* op = "cross_entropy_backward";
  CrossEntropyCall call = cross_entropy_call(op, input, target, weight, reduction, ignore_index, label_smoothing);
  auto& args = call.args;
  const DeviceOf device(input);
  const ScalarType accumulator = accumulator_dtype(input);
  check_cross_entropy_gradient(op, grad_output, input, stats, args.rows, reduction);
  const Tensor grad_rows = contiguous_as(grad_output, accumulator);
  args.row_stats = stats.data_ptr();
  args.grad_per_row = reduction == kNone;
  args.grad_rows = grad_rows.data_ptr();

  Tensor grad_input = torch::stable::empty_like(input);
  if (input.numel() == 0) return grad_input;
  call.grad_input = grad_input;
  choose_layout(call);
  check_launch(op,
               launch_cross_entropy_backward(dtype_of(input, op, "input"), args, call.layout,
                                             reduction == kMean ? total_weight_of(stats) : nullptr, device.stream()));
  if (call.grad_input->data_ptr() != grad_input.data_ptr()) torch::stable::copy_(grad_input, *call.grad_input);
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace fastnn::cuda
