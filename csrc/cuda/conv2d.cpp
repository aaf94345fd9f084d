// Glue of fastnn::conv2d, conv2d_relu_max_pool2d and conv2d_backward on CUDA devices: checks, output allocation, and
// the problems (kernels/conv2d.h) that a call is made of.
#include <algorithm>
#include <array>
#include <climits>
#include <numeric>
#include <tuple>

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include "common/conv2d_call.h"
#include "cuda/device.h"
#include "cuda/kernels/conv2d.h"

namespace fastnn::cuda {
namespace {

using torch::headeronly::MemoryFormat;

Tensor empty_4d(const Tensor& like, std::array<int64_t, 4> sizes, bool channels_last, ScalarType dtype) {
  return torch::stable::empty({sizes.data(), 4}, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A plane's positions, and what one result is summed over, are counted in 31 bits; tensors in 64.
void check_size(const char* op, const ConvShape& s) {
  const int64_t in_h = s.in_h + s.pad_top + s.pad_bottom, in_w = s.in_w + s.pad_left + s.pad_right;
  const double plane = double(in_h) * double(in_w),
               depth = double(s.kernel_h) * double(s.kernel_w) * double(s.group_in());
  STD_TORCH_CHECK(plane < INT_MAX / 2 && depth < INT_MAX / 2 && s.in_channels < INT_MAX && s.out_channels < INT_MAX, op,
                  ": an image of ", in_h, " x ", in_w, " or ", s.in_channels,
                  " channels is larger than the kernels take");
}

// The kernels take strides of 31 bits. Where one is longer than the plane there is one window, whatever it is.
PoolShape short_strides(PoolShape pool, const ConvShape& s) {
  pool.stride_h = std::min(pool.stride_h, s.out_h), pool.stride_w = std::min(pool.stride_w, s.out_w);
  return pool;
}

ConvSource source_of(const Tensor& t) { return {t.data_ptr(), strides4(t), int(t.size(2)), int(t.size(3))}; }

// Whether PyTorch's own convolutions would round float32 to TF32 now. The stable ABI cannot tell, Python can.
bool allows_tf32(DType dtype) {
  namespace py = pybind11;
  if (dtype != kFloat32) return false;
  const py::gil_scoped_acquire gil;
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> precision;
  precision.call_once_and_store_result(
      [] { return py::module_::import("torch").attr("_C").attr("_get_fp32_precision_getter"); });
  return py::cast<std::string>(precision.get_stored()("cuda", "conv")) == "tf32";
}

ConvGeometry geometry_of(const ConvShape& s, const Tensor& input, DType dtype) {
  return {source_of(input),
          {-int(s.pad_top), int(s.stride_h), int(s.dilation_h), int(s.kernel_h)},
          {-int(s.pad_left), int(s.stride_w), int(s.dilation_w), int(s.kernel_w)},
          s.batch,
          int(s.out_h),
          int(s.out_w),
          int(s.groups),
          int(s.group_in()),
          int(s.group_out()),
          allows_tf32(dtype)};
}

void run(const char* op, DType dtype, const ConvProblem& problem, const Tensor& like, cudaStream_t stream) {
  const Tensor scratch = torch::stable::new_empty(like, {conv_scratch_bytes(dtype, problem)}, ScalarType::Byte);
  check_launch(op, launch_conv(dtype, problem, scratch.data_ptr(), stream));
}

ConvProblem forward_problem(const ConvShape& s, DType dtype, const Tensor& input, const Tensor& weight,
                            const std::optional<Tensor>& bias, bool relu) {
  ConvProblem p{geometry_of(s, input, dtype)};
  p.weight = weight.data_ptr();
  p.weight_group = s.group_out() * weight.stride(0), p.weight_result = weight.stride(0);
  p.weight_channel = weight.stride(1), p.weight_row = weight.stride(2), p.weight_col = weight.stride(3);
  if (bias) p.bias = bias->data_ptr(), p.bias_stride = bias->stride(0);
  p.relu = relu;
  return p;
}

Tensor conv2d(Tensor input, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding, Ints dilation,
              int64_t groups, bool relu) {
  const char* op = "conv2d";
  const ConvShape s = conv_shape(op, input, weight, stride, padding, dilation, groups);
  const DType dtype = dtype_of(input, op, "input");
  check_conv_bias(op, bias, input, s);
  check_size(op, s);
  const DeviceOf device(input);
  const Tensor output = empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w},
                                 result_is_channels_last(input, weight), input.scalar_type());
  if (output.numel() == 0) return output;
  ConvProblem p = forward_problem(s, dtype, input, weight, bias, relu);
  p.result = output.data_ptr(), p.result_stride = strides4(output);
  run(op, dtype, p, input, device.stream());
  return output;
}

std::tuple<Tensor, Tensor> conv2d_relu_max_pool2d(Tensor input, Tensor weight, std::optional<Tensor> bias, Ints stride,
                                                  Ints padding, Ints dilation, int64_t groups, Ints pool_kernel_size,
                                                  Ints pool_stride) {
  const char* op = "conv2d_relu_max_pool2d";
  const ConvShape s = conv_shape(op, input, weight, stride, padding, dilation, groups);
  const PoolShape pool = short_strides(pool_shape(op, s, pool_kernel_size, pool_stride), s);
  const DType dtype = dtype_of(input, op, "input");
  check_conv_bias(op, bias, input, s);
  check_size(op, s);
  const DeviceOf device(input);
  const bool channels_last = result_is_channels_last(input, weight);
  const std::array<int64_t, 4> sizes{s.batch, s.out_channels, pool.out_h, pool.out_w};
  const Tensor output = empty_4d(input, sizes, channels_last, input.scalar_type());
  const Tensor code = empty_4d(input, sizes, channels_last, ScalarType::Byte);
  if (output.numel() == 0) return {output, code};
  ConvProblem p = forward_problem(s, dtype, input, weight, bias, true);
  p.pool = pool;
  auto* const codes = static_cast<uint8_t*>(code.data_ptr());
  if (pools_results(dtype, p)) {
    p.result = output.data_ptr(), p.result_stride = strides4(output), p.pool_code = codes;
    run(op, dtype, p, input, device.stream());
    return {output, code};
  }
  const Tensor results =
      empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w}, channels_last, input.scalar_type());
  p.result = results.data_ptr(), p.result_stride = strides4(results);
  run(op, dtype, p, input, device.stream());
  check_launch(op, launch_pool(dtype,
                               {results.data_ptr(), strides4(results), s.batch, int(s.out_channels), pool,
                                output.data_ptr(), codes, strides4(output)},
                               device.stream()));
  return {output, code};
}

// ---- backward ----

// The taps of a dimension that meet the input at `phase` modulo the stride, and where they do. Input phase + i * stride
// is what tap k of output (phase + i * stride + pad - k * dilation) / stride reads, where that is a whole number: for
// k = first_tap, first_tap + tap_step, ..
struct Phase {
  Reach reach;
  int64_t first_tap, tap_step, count;
};
Phase phase_of(int64_t phase, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t step = stride / std::gcd(stride, dilation);
  int64_t first = 0;
  while (first < step && (phase + pad - first * dilation) % stride != 0) ++first;
  const int64_t taps = first < std::min(step, kernel) ? (kernel - first + step - 1) / step : 0;
  const Reach reach{int((phase + pad - first * dilation) / stride), 1, int(-step * dilation / stride), int(taps)};
  return {reach, first, step, (size - phase + stride - 1) / stride};
}

void grad_input(const char* op, const ConvShape& s, DType dtype, const ConvSource& grad, const Tensor& weight,
                const Tensor& result, cudaStream_t stream) {
  const Strides4 stride = strides4(result);
  const bool tf32 = allows_tf32(dtype);
  for (int64_t a = 0; a < std::min(s.stride_h, s.in_h); ++a)
    for (int64_t b = 0; b < std::min(s.stride_w, s.in_w); ++b) {
      const Phase rows = phase_of(a, s.in_h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h);
      const Phase cols = phase_of(b, s.in_w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w);
      ConvProblem p{{grad, rows.reach, cols.reach, s.batch, int(rows.count), int(cols.count), int(s.groups),
                     int(s.group_out()), int(s.group_in()), tf32}};
      const int64_t element = weight.element_size();
      p.weight = static_cast<const char*>(weight.data_ptr()) +
                 (rows.first_tap * weight.stride(2) + cols.first_tap * weight.stride(3)) * element;
      p.weight_group = s.group_out() * weight.stride(0), p.weight_result = weight.stride(1);
      p.weight_channel = weight.stride(0);
      p.weight_row = rows.tap_step * weight.stride(2), p.weight_col = cols.tap_step * weight.stride(3);
      p.result = static_cast<char*>(result.data_ptr()) + (a * stride.h + b * stride.w) * element;
      p.result_stride = {stride.n, stride.c, stride.h * s.stride_h, stride.w * s.stride_w};
      run(op, dtype, p, weight, stream);
    }
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(Tensor grad_output, Tensor input, Tensor weight,
                                                   std::optional<Tensor> relu_output, std::optional<Tensor> pool_code,
                                                   Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                   Ints pool_kernel_size, Ints pool_stride,
                                                   std::vector<bool> output_mask) {
  const char* op = "conv2d_backward";
  const ConvShape s = conv_shape(op, input, weight, stride, padding, dilation, groups);
  const DType dtype = dtype_of(input, op, "input");
  const PoolShape pool = check_conv_gradient(op, grad_output, input, s, relu_output, pool_code, pool_kernel_size,
                                             pool_stride, output_mask);
  check_size(op, s);
  const DeviceOf device(input);
  const auto none = [&] { return torch::stable::new_empty(input, {0}, input.scalar_type()); };
  Tensor input_result = output_mask[0] ? empty_4d(input, {s.batch, s.in_channels, s.in_h, s.in_w},
                                                  result_is_channels_last(input, weight), input.scalar_type())
                                       : none();
  Tensor weight_result = output_mask[1] ? empty_4d(weight, {s.out_channels, s.group_in(), s.kernel_h, s.kernel_w},
                                                   false, input.scalar_type())
                                        : none();
  Tensor bias_result = output_mask[2] ? torch::stable::new_empty(input, {s.out_channels}, input.scalar_type()) : none();
  if (grad_output.numel() == 0 || input.numel() == 0) {
    for (Tensor* t : {&input_result, &weight_result, &bias_result}) torch::stable::zero_(*t);
    return {input_result, weight_result, bias_result};
  }

  ConvSource grad = source_of(grad_output);
  grad.height = int(s.out_h), grad.width = int(s.out_w);
  if (pool_code) {
    grad.pool_code = static_cast<const uint8_t*>(pool_code->data_ptr()), grad.code_stride = strides4(*pool_code);
    grad.pool = short_strides(pool, s);
  } else if (relu_output) {
    grad.relu_output = relu_output->data_ptr(), grad.relu_stride = strides4(*relu_output);
  }
  if (output_mask[0]) grad_input(op, s, dtype, grad, weight, input_result, device.stream());
  if (output_mask[1] || output_mask[2]) {
    const GradWeightProblem p{geometry_of(s, input, dtype), grad, output_mask[1] ? weight_result.data_ptr() : nullptr,
                              output_mask[2] ? bias_result.data_ptr() : nullptr};
    const Tensor scratch = torch::stable::new_empty(input, {grad_weight_scratch_bytes(dtype, p)}, ScalarType::Byte);
    check_launch(op, launch_grad_weight(dtype, p, scratch.data_ptr(), device.stream()));
  }
  return {input_result, weight_result, bias_result};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("conv2d_relu_max_pool2d", TORCH_BOX(&conv2d_relu_max_pool2d));
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward));
}

}  // namespace fastnn::cuda
