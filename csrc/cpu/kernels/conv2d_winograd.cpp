#include "cpu/kernels/conv2d_winograd.h"

#define FASTNN_TIER_SOURCE "cpu/kernels/conv2d_winograd_tier.h"
#include "cpu/kernels/for_each_tier.h"

namespace fastnn::cpu {

const WinogradKernels& winograd_kernels() { return FASTNN_TIER(kWinogradKernels); }

}  // namespace fastnn::cpu
