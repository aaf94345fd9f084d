#include "common/conv2d_call.h"

#include <array>

#include "common/strides.h"

namespace fastnn {
namespace {

int64_t out_size(int64_t in, int64_t pads, int64_t kernel, int64_t stride, int64_t dilation) {
  return (in + pads - dilation * (kernel - 1) - 1) / stride + 1;
}

}  // namespace

bool result_is_channels_last(const Tensor& input, const Tensor& weight) {
  return is_channels_last(input) || is_channels_last(weight);
}

ConvShape conv_shape(const char* op, const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                     const Ints& dilation, int64_t groups) {
  check_dim(input, 4, op, "input");
  check_dim(weight, 4, op, "weight");
  check_same_dtype(weight, input, op, "weight");
  check_same_device(weight, input, op, "weight");
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4, op,
                  ": expected 2 values of stride and dilation and 4 of padding, got ", stride.size(), ", ",
                  dilation.size(), " and ", padding.size());
  for (int64_t v : {stride[0], stride[1], dilation[0], dilation[1], groups})
    STD_TORCH_CHECK(v > 0, op, ": stride, dilation and groups must be positive, got ", v);
  for (int64_t v : padding) STD_TORCH_CHECK(v >= 0, op, ": padding must not be negative, got ", v);
  STD_TORCH_CHECK(input.size(1) == weight.size(1) * groups && weight.size(0) % groups == 0 && weight.size(0) > 0 &&
                      weight.size(1) > 0,
                  op, ": input of shape ", shape_string(input), ", weight of shape ", shape_string(weight),
                  " and groups ", groups, " do not fit together");
  ConvShape s;
  s.batch = input.size(0), s.in_channels = input.size(1), s.in_h = input.size(2), s.in_w = input.size(3);
  s.out_channels = weight.size(0), s.kernel_h = weight.size(2), s.kernel_w = weight.size(3);
  s.stride_h = stride[0], s.stride_w = stride[1], s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  s.pad_top = padding[0], s.pad_left = padding[1], s.pad_bottom = padding[2], s.pad_right = padding[3];
  s.groups = groups;
  STD_TORCH_CHECK(s.kernel_h > 0 && s.kernel_w > 0 &&
                      s.in_h + s.pad_top + s.pad_bottom > s.dilation_h * (s.kernel_h - 1) &&
                      s.in_w + s.pad_left + s.pad_right > s.dilation_w * (s.kernel_w - 1),
                  op, ": weight of shape ", shape_string(weight), " is larger than the padded input of shape ",
                  shape_string(input));
  s.out_h = out_size(s.in_h, s.pad_top + s.pad_bottom, s.kernel_h, s.stride_h, s.dilation_h);
  s.out_w = out_size(s.in_w, s.pad_left + s.pad_right, s.kernel_w, s.stride_w, s.dilation_w);
  return s;
}

PoolShape pool_shape(const char* op, const ConvShape& s, const Ints& kernel, const Ints& stride) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2, op,
                  ": expected 2 values of pool_kernel_size and pool_stride");
  PoolShape pool;
  pool.kernel_h = kernel[0], pool.kernel_w = kernel[1], pool.stride_h = stride[0], pool.stride_w = stride[1];
  STD_TORCH_CHECK(
      pool.kernel_h > 0 && pool.kernel_w > 0 && pool.stride_h > 0 && pool.stride_w > 0 && pool.kernel_h <= s.out_h &&
          pool.kernel_w <= s.out_w && pool.kernel_h * pool.kernel_w <= kPoolNone,
      op, ": pool_kernel_size is ", pool.kernel_h, " x ", pool.kernel_w, ", pool_stride ", pool.stride_h, " x ",
      pool.stride_w, ", expected a window of 1 to ", int(kPoolNone), " elements inside ", s.out_h, " x ", s.out_w);
  pool.out_h = (s.out_h - pool.kernel_h) / pool.stride_h + 1;
  pool.out_w = (s.out_w - pool.kernel_w) / pool.stride_w + 1;
  return pool;
}

void check_conv_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& input, const ConvShape& s) {
  if (!bias) return;
  check_same_dtype(*bias, input, op, "bias");
  check_same_device(*bias, input, op, "bias");
  check_dim(*bias, 1, op, "bias");
  STD_TORCH_CHECK(bias->size(0) == s.out_channels, op, ": bias has shape ", shape_string(*bias), ", expected [",
                  s.out_channels, "]");
}

PoolShape check_conv_gradient(const char* op, const Tensor& grad_output, const Tensor& input, const ConvShape& s,
                              const std::optional<Tensor>& relu_output, const std::optional<Tensor>& pool_code,
                              const Ints& pool_kernel_size, const Ints& pool_stride,
                              const std::vector<bool>& output_mask) {
  check_same_dtype(grad_output, input, op, "grad_output");
  check_same_device(grad_output, input, op, "grad_output");
  check_dim(grad_output, 4, op, "grad_output");
  STD_TORCH_CHECK(output_mask.size() == 3, op, ": output_mask has ", output_mask.size(), " values, expected 3");
  PoolShape pool;
  std::array<int64_t, 4> expected{s.batch, s.out_channels, s.out_h, s.out_w};
  if (pool_code) {
    pool = pool_shape(op, s, pool_kernel_size, pool_stride);
    expected[2] = pool.out_h, expected[3] = pool.out_w;
    check_same_shape(*pool_code, grad_output, op, "pool_code");
    check_same_device(*pool_code, grad_output, op, "pool_code");
    STD_TORCH_CHECK(pool_code->scalar_type() == ScalarType::Byte, op, ": pool_code has dtype ",
                    torch::headeronly::toString(pool_code->scalar_type()), ", expected uint8");
  } else if (relu_output) {
    check_same_shape(*relu_output, grad_output, op, "relu_output");
    check_same_dtype(*relu_output, input, op, "relu_output");
    check_same_device(*relu_output, grad_output, op, "relu_output");
  }
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(grad_output.size(d) == expected[d], op, ": grad_output has shape ", shape_string(grad_output),
                    ", expected ", expected[d], " in dimension ", d);
  return pool;
}

}  // namespace fastnn
