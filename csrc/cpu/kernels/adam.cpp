#include "cpu/kernels/adam.h"

#define FASTNN_TIER_SOURCE "cpu/kernels/adam_tier.h"
#include "cpu/kernels/for_each_tier.h"

namespace fastnn::cpu {

const AdamKernels& adam_kernels() { return FASTNN_TIER(kAdamKernels); }

}  // namespace fastnn::cpu
