// The geometry of a 2-D convolution and of the max-pooling fused behind it. Torch-free.
#pragma once

#include <cstdint>

namespace fastnn {

struct ConvShape {
  int64_t batch, in_channels, in_h, in_w;
  int64_t out_channels, out_h, out_w;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
  int64_t dilation_h, dilation_w;
  int64_t groups;

  int64_t group_in() const { return in_channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
};

// Max-pooling without padding or dilation; kernel_h == 0: none.
struct PoolShape {
  int64_t kernel_h = 0, kernel_w = 0;
  int64_t stride_h = 1, stride_w = 1;
  int64_t out_h = 0, out_w = 0;
};

// The code of a pooled output that ReLU zeroed: no element of its window gets a gradient.
constexpr uint8_t kPoolNone = 255;

// A 4-D tensor in memory: element strides of batch, channel, row and column.
struct Strides4 {
  int64_t n, c, h, w;
};

}  // namespace fastnn
