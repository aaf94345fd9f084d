#include "cpu/kernels/sgd.h"

#define FASTNN_TIER_SOURCE "cpu/kernels/sgd_tier.h"
#include "cpu/kernels/for_each_tier.h"

namespace fastnn::cpu {

const SgdKernels& sgd_kernels() { return FASTNN_TIER(kSgdKernels); }

}  // namespace fastnn::cpu
