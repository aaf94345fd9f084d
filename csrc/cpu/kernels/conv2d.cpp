#include "cpu/kernels/conv2d.h"

#define FASTNN_BF16_TIER 1
#define FASTNN_TIER_SOURCE "cpu/kernels/conv2d_tier.h"
#include "cpu/kernels/for_each_tier.h"

namespace fastnn::cpu {

const ConvKernels& conv_kernels() { return FASTNN_TIER(kConvKernels); }

}  // namespace fastnn::cpu
