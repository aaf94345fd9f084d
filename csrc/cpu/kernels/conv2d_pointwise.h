// 1 x 1 convolution without padding on channels_last memory: the interface of conv2d_pointwise_tier.h. Torch-free.
#pragma once

#include "cpu/kernels/conv2d.h"

namespace fastnn::cpu {

struct PointwiseKernels {
  int panel[2];  // results of a panel, of float64 and float32
  // Panels [begin, end); strides: of group, result and channel.
  void (*pack_weight[kNumDTypes])(const TapConv&, const void* weight, const int64_t* strides, void* packed,
                                  int64_t begin, int64_t end);
  // Tasks [begin, end) of rows * channel_blocks; scratch: cols * (panel + channels) elements of accumulator type.
  void (*run[kNumDTypes])(const TapConv&, void* scratch, int64_t begin, int64_t end);
};

const PointwiseKernels& pointwise_kernels();

}  // namespace fastnn::cpu
