// The CPU's definition of csrc/cuda/device.h: the kernels serve CPU tensors, in place of the CPU's own.
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.h"
#include "common/tensor_lists.h"

#define FASTNN_CUDA_KEY CPU

namespace fastnn::cuda {

constexpr DeviceCode kDevice = kCpuDevice;
constexpr bool kOnHost = true;

struct DeviceOf {
  explicit DeviceOf(const Tensor&) {}
  explicit DeviceOf(const View&) {}
  cudaStream_t stream() const { return nullptr; }
};

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace fastnn::cuda
