#include "cpu/kernels/conv2d_depthwise.h"

#define FASTNN_TIER_SOURCE "cpu/kernels/conv2d_depthwise_tier.h"
#include "cpu/kernels/for_each_tier.h"

namespace fastnn::cpu {

const DepthwiseKernels& depthwise_kernels() { return FASTNN_TIER(kDepthwiseKernels); }

}  // namespace fastnn::cpu
