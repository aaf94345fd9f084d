#include "cpu/kernels/conv2d_pointwise.h"

#define FASTNN_BF16_TIER 1
#define FASTNN_TIER_SOURCE "cpu/kernels/conv2d_pointwise_tier.h"
#include "cpu/kernels/for_each_tier.h"

namespace fastnn::cpu {

const PointwiseKernels& pointwise_kernels() { return FASTNN_TIER(kPointwiseKernels); }

}  // namespace fastnn::cpu
