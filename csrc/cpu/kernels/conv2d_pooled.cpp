#include "cpu/kernels/conv2d_pooled.h"

#define FASTNN_TIER_SOURCE "cpu/kernels/conv2d_pooled_tier.h"
#include "cpu/kernels/for_each_tier.h"

namespace fastnn::cpu {

const PooledKernels& pooled_kernels() { return FASTNN_TIER(kPooledKernels); }

}  // namespace fastnn::cpu
