// Launchers of the CUDA ReLU kernels: elementwise over `count` contiguous elements.
#pragma once

#include <cuda_runtime_api.h>

#include "common/dtype.h"

namespace fastnn::cuda {

// y = x < 0 ? 0 : x. x and y may be the same memory.
cudaError_t launch_relu(DType dtype, const void* x, void* y, int64_t count, cudaStream_t stream);
// grad_x = grad_y where not (y <= 0), else 0.
cudaError_t launch_relu_backward(DType dtype, const void* grad_y, const void* y, void* grad_x, int64_t count,
                                 cudaStream_t stream);

}  // namespace fastnn::cuda
