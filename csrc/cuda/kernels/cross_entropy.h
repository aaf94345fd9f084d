// Launchers of the CUDA cross-entropy kernels; common/cross_entropy.h describes what they compute on. Weights may be
// null for any target.
#pragma once

#include <cuda_runtime_api.h>

#include "common/cross_entropy.h"
#include "common/dtype.h"

namespace fastnn::cuda {

// Bytes of scratch memory that launch_cross_entropy and launch_cross_entropy_total need.
int64_t cross_entropy_scratch_bytes(DType dtype, const CrossEntropyArgs& args);

// Fills in row_stats and loss. The rows' indices are checked on the device.
cudaError_t launch_cross_entropy(DType dtype, const CrossEntropyArgs& args, Layout layout, void* scratch,
                                 cudaStream_t stream);

// Adds up the losses and the weights of their targets. total_weight is A; output is T, and null for kNone.
cudaError_t launch_cross_entropy_total(DType dtype, const CrossEntropyArgs& args, Reduction reduction, void* scratch,
                                       void* total_weight, void* output, cudaStream_t stream);

// Fills in grad_input. total_weight: what the gradient is divided by, or null.
cudaError_t launch_cross_entropy_backward(DType dtype, const CrossEntropyArgs& args, Layout layout,
                                          const void* total_weight, cudaStream_t stream);

}  // namespace fastnn::cuda
