// What the glue of the convolutions shares, CPU and CUDA alike: the checks of a call, and the layout of its result.
#pragma once

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/conv_shape.h"

namespace fastnn {

using Ints = std::vector<int64_t>;

inline Strides4 strides4(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Torch's rule: a result is channels_last if either the input or the weight is.
bool result_is_channels_last(const Tensor& input, const Tensor& weight);

// Checks the arguments that all three operators have in common.
ConvShape conv_shape(const char* op, const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                     const Ints& dilation, int64_t groups);
PoolShape pool_shape(const char* op, const ConvShape& s, const Ints& kernel, const Ints& stride);
void check_conv_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& input, const ConvShape& s);

// Checks what only backward takes. The shape of the max-pool, if there was one.
PoolShape check_conv_gradient(const char* op, const Tensor& grad_output, const Tensor& input, const ConvShape& s,
                              const std::optional<Tensor>& relu_output, const std::optional<Tensor>& pool_code,
                              const Ints& pool_kernel_size, const Ints& pool_stride,
                              const std::vector<bool>& output_mask);

}  // namespace fastnn
