// ReLU and its gradient, elementwise.
//
// Blocking: a thread takes kPacks packs of 16 bytes, a block's width apart so that a warp's accesses are neighbours,
// and reads all of them before it writes the first. Memory that is not aligned to 16 bytes goes element by element.
// Bytes: forward reads and writes each element once (2 * count * sizeof(T)), backward reads two and writes one; one
// compare and one select an element: memory-bound.
// Torch's conventions: NaN passes through both ways (the gradient's mask is !(y <= 0)). -0 stays -0, as on the CPU; of
// torch's own CUDA kernel it may become 0 (2.11).
#include "cuda/kernels/relu.h"

#include "cuda/kernels/launch.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 4;

template <class T, int N>
__global__ void __launch_bounds__(kThreads) relu_forward_kernel(const T* x, T* y, int64_t count) {
  const int64_t packs = count / N, first = int64_t(blockIdx.x) * (kThreads * kPacks) + threadIdx.x;
  Pack<T, N> v[kPacks];
#pragma unroll
  for (int u = 0; u < kPacks; ++u)
    if (first + u * kThreads < packs) v[u] = load_pack<N>(x + (first + u * kThreads) * N);
#pragma unroll
  for (int u = 0; u < kPacks; ++u) {
    if (first + u * kThreads >= packs) break;
#pragma unroll
    for (T& value : v[u].values) value = widen(value) < 0 ? T{} : value;
    store_pack(y + (first + u * kThreads) * N, v[u]);
  }
  const int64_t tail = packs * N + first;
  if (tail < count) y[tail] = widen(x[tail]) < 0 ? T{} : x[tail];
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    relu_backward_kernel(const T* grad_y, const T* y, T* grad_x, int64_t count) {
  const int64_t packs = count / N, first = int64_t(blockIdx.x) * (kThreads * kPacks) + threadIdx.x;
  Pack<T, N> g[kPacks], v[kPacks];
#pragma unroll
  for (int u = 0; u < kPacks; ++u)
    if (first + u * kThreads < packs) {
      g[u] = load_pack<N>(grad_y + (first + u * kThreads) * N);
      v[u] = load_pack<N>(y + (first + u * kThreads) * N);
    }
#pragma unroll
  for (int u = 0; u < kPacks; ++u) {
    if (first + u * kThreads >= packs) break;
#pragma unroll
    for (int i = 0; i < N; ++i) g[u].values[i] = widen(v[u].values[i]) <= 0 ? T{} : g[u].values[i];
    store_pack(grad_x + (first + u * kThreads) * N, g[u]);
  }
  const int64_t tail = packs * N + first;
  if (tail < count) grad_x[tail] = widen(y[tail]) <= 0 ? T{} : grad_y[tail];
}

// One thread for every kPacks packs; at least one block, for a tail shorter than a pack.
template <class T, int N>
int64_t blocks_for(int64_t count) {
  return ceil_div(count, int64_t(kThreads) * kPacks * N);
}

}  // namespace

cudaError_t launch_relu(DType dtype, const void* x, void* y, int64_t count, cudaStream_t stream) {
  return with_dtype(dtype, [=](auto element) {
    using T = decltype(element);
    constexpr int N = kPackElements<T>;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    if (all_aligned(x, y))
      return launch(relu_forward_kernel<T, N>, blocks_for<T, N>(count), kThreads, stream, from, to, count);
    return launch(relu_forward_kernel<T, 1>, blocks_for<T, 1>(count), kThreads, stream, from, to, count);
  });
}

cudaError_t launch_relu_backward(DType dtype, const void* grad_y, const void* y, void* grad_x, int64_t count,
                                 cudaStream_t stream) {
  return with_dtype(dtype, [=](auto element) {
    using T = decltype(element);
    constexpr int N = kPackElements<T>;
    const auto *g = static_cast<const T*>(grad_y), *v = static_cast<const T*>(y);
    auto* to = static_cast<T*>(grad_x);
    if (all_aligned(grad_y, y, grad_x))
      return launch(relu_backward_kernel<T, N>, blocks_for<T, N>(count), kThreads, stream, g, v, to, count);
    return launch(relu_backward_kernel<T, 1>, blocks_for<T, 1>(count), kThreads, stream, g, v, to, count);
  });
}

}  // namespace fastnn::cuda
