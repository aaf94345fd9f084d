// How the launchers start their kernels, and the 16-byte vectors in which kernels move memory.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "cuda/kernels/intrinsics.h"

namespace fastnn::cuda {

// kernel<<<blocks, threads, 0, stream>>>(args...); nothing where there are no blocks.
template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, cudaStream_t stream, Args... args) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = threads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Calls f with a value of the dtype's element type.
template <class F>
cudaError_t with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case kFloat64:
      return f(double{});
    case kFloat32:
      return f(float{});
    case kBFloat16:
      return f(bf16{});
    default:
      return f(f16{});
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// N neighbouring elements, moved by one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// Elements in 16 bytes, the most that one instruction moves.
template <class T>
constexpr int kPackElements = int(16 / sizeof(T));

template <class... Pointers>
bool all_aligned(Pointers... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

template <int N, class T>
__device__ inline Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <class T, int N>
__device__ inline void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

}  // namespace fastnn::cuda
