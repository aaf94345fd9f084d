// What the CUDA glue asks of torch and of the CUDA runtime; the tests' CPU emulation has its own.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/check.h"
#include "common/tensor_lists.h"

// The dispatch key that the kernels are registered for.
#define FASTNN_CUDA_KEY CUDA

namespace fastnn::cuda {

// Where the tensors are, and whether that is the memory the host itself works in.
constexpr DeviceCode kDevice = kCudaDevice;
constexpr bool kOnHost = false;

// Makes the tensor's device the current one while it lives.
class DeviceOf {
 public:
  explicit DeviceOf(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}
  explicit DeviceOf(const View& view) : index_(view.device_index), guard_(index_) {}

  // Torch's current stream of the device.
  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or torch's next launch reports it once more, as its own
  STD_TORCH_CHECK(false, op, ": ", cudaGetErrorString(error));
}

}  // namespace fastnn::cuda
