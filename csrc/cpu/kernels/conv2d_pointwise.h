// 1 x 1 convolution without padding: the interface of conv2d_pointwise_tier.h. Torch-free.
#pragma once

#include "cpu/kernels/conv2d.h"

namespace fastnn::cpu {

struct PointwiseKernels {
  int panel[2];  // elements of a panel's two vectors, of float64 and float32,
  int rows;      // and rows of a tile; a block of results is the one in channels_last, the other in NCHW
  // Blocks [begin, end) of `width` results; strides: of group, result and channel.
  void (*pack_weight[kNumDTypes])(const TapConv&, int64_t width, const void* weight, const int64_t* strides,
                                  void* packed, int64_t begin, int64_t end);
  // Tasks [begin, end) of rows * channel_blocks; scratch: channels * cols elements of accumulator type, in NCHW of cols
  // rounded up to panels.
  void (*run[kNumDTypes])(const TapConv&, void* scratch, int64_t begin, int64_t end);
};

const PointwiseKernels& pointwise_kernels();

}  // namespace fastnn::cpu
