#include "cpu/kernels/max_pool2d.h"

#define FASTNN_TIER_SOURCE "cpu/kernels/max_pool2d_tier.h"
#include "cpu/kernels/for_each_tier.h"

namespace fastnn::cpu {

const MaxPool2dKernels& max_pool2d_kernels() { return FASTNN_TIER(kMaxPool2dKernels); }

}  // namespace fastnn::cpu
