#include "cpu/kernels/cross_entropy.h"

#define FASTNN_TIER_SOURCE "cpu/kernels/cross_entropy_tier.h"
#include "cpu/kernels/for_each_tier.h"

namespace fastnn::cpu {

const CrossEntropyKernels& cross_entropy_kernels() { return FASTNN_TIER(kCrossEntropyKernels); }

}  // namespace fastnn::cpu
