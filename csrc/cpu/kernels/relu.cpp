#include "cpu/kernels/relu.h"

#define FASTNN_TIER_SOURCE "cpu/kernels/relu_tier.h"
#include "cpu/kernels/for_each_tier.h"

namespace fastnn::cpu {

const ReluKernels& relu_kernels() { return FASTNN_TIER(kReluKernels); }

}  // namespace fastnn::cpu
