// One elementwise update over many tensors in as few launches as kernel arguments hold: what the optimizers' kernels
// share. A launch's arguments are the tensors' addresses and sizes; a block finds its own by bisection.
#pragma once

#include <cstring>

#include "cuda/kernels/launch.h"
#include "cuda/kernels/tensor_list.h"

namespace fastnn::cuda {

__device__ inline double read(const Scalar& scalar) {
  if (!scalar.data) return scalar.value;
  switch (scalar.dtype) {
    case kFloat64:
      return *static_cast<const double*>(scalar.data);
    case kFloat32:
      return *static_cast<const float*>(scalar.data);
    case kBFloat16:
      return widen(*static_cast<const bf16*>(scalar.data));
    default:
      return widen(*static_cast<const f16*>(scalar.data));
  }
}

// Tensors whose elements lie in the same order in every operand.
template <int kOperands>
struct BatchedTensor {
  void* data[kOperands];
  int64_t count;
  unsigned first_block;
  unsigned number;  // in the caller's lists
};

constexpr int kBatchThreads = 256;
constexpr int kBatchPacks = 2;            // of every operand, a thread
constexpr size_t kArgumentBytes = 32764;  // CUDA 12.1's limit; 512 are left to the other arguments

template <int kOperands>
struct TensorBatch {
  static constexpr int kCapacity = int((kArgumentBytes - 512) / sizeof(BatchedTensor<kOperands>));
  int size;
  BatchedTensor<kOperands> tensors[kCapacity];
};

// The last tensor that does not begin behind this block.
template <int kOperands>
__device__ const BatchedTensor<kOperands>& tensor_of_block(const TensorBatch<kOperands>& batch) {
  int low = 0, high = batch.size - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.tensors[middle].first_block <= blockIdx.x)
      low = middle;
    else
      high = middle - 1;
  }
  return batch.tensors[low];
}

// Elements that a block takes.
template <class T>
constexpr int kBatchBlock = kBatchThreads * kBatchPacks * kPackElements<T>;

// Runs this thread's share of the block: update(values) gets and changes one element of every operand. Operands that
// `reads` leaves out are not loaded, those that `writes` leaves out not stored.
template <class T, int kOperands, class Update>
__device__ void update_block(const BatchedTensor<kOperands>& tensor, unsigned reads, unsigned writes,
                             const Update& update) {
  using A = Accumulator<T>;
  constexpr int N = kPackElements<T>;
  const int64_t begin = int64_t(blockIdx.x - tensor.first_block) * kBatchBlock<T>;
  const int64_t left = tensor.count - begin;
  bool aligned = left >= kBatchBlock<T>;
#pragma unroll
  for (int k = 0; k < kOperands; ++k) aligned = aligned && reinterpret_cast<uintptr_t>(tensor.data[k]) % 16 == 0;
  if (aligned) {
    Pack<T, N> packs[kBatchPacks][kOperands];
#pragma unroll
    for (int u = 0; u < kBatchPacks; ++u)
#pragma unroll
      for (int k = 0; k < kOperands; ++k)
        if (reads >> k & 1)
          packs[u][k] =
              load_pack<N>(static_cast<const T*>(tensor.data[k]) + begin + (u * kBatchThreads + threadIdx.x) * N);
        else
          packs[u][k] = {};
#pragma unroll
    for (int u = 0; u < kBatchPacks; ++u) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        A values[kOperands];
#pragma unroll
        for (int k = 0; k < kOperands; ++k) values[k] = widen(packs[u][k].values[i]);
        update(values);
#pragma unroll
        for (int k = 0; k < kOperands; ++k) packs[u][k].values[i] = narrow<T>(values[k]);
      }
#pragma unroll
      for (int k = 0; k < kOperands; ++k)
        if (writes >> k & 1)
          store_pack(static_cast<T*>(tensor.data[k]) + begin + (u * kBatchThreads + threadIdx.x) * N, packs[u][k]);
    }
    return;
  }
  for (int64_t i = begin + threadIdx.x; i < begin + kBatchBlock<T> && i < tensor.count; i += kBatchThreads) {
    A values[kOperands];
#pragma unroll
    for (int k = 0; k < kOperands; ++k)
      values[k] = reads >> k & 1 ? widen(static_cast<const T*>(tensor.data[k])[i]) : A(0);
    update(values);
#pragma unroll
    for (int k = 0; k < kOperands; ++k)
      if (writes >> k & 1) static_cast<T*>(tensor.data[k])[i] = narrow<T>(values[k]);
  }
}

// Cuts the list into batches and calls start(batch, blocks) for each.
template <class T, int kOperands, class Start>
cudaError_t for_each_batch(const TensorList& list, const Start& start) {
  TensorBatch<kOperands> batch;
  batch.size = 0;
  int64_t blocks = 0;
  cudaError_t error = cudaSuccess;
  const auto flush = [&] {
    if (error == cudaSuccess) error = start(batch, blocks);
    batch.size = 0;
    blocks = 0;
  };
  for (size_t i = 0; i < list.counts.size(); ++i) {
    if (list.counts[i] == 0) continue;
    const int64_t more = ceil_div(list.counts[i], kBatchBlock<T>);
    if (batch.size == batch.kCapacity || (batch.size > 0 && blocks + more > INT_MAX)) flush();
    auto& tensor = batch.tensors[batch.size++];
    std::memcpy(tensor.data, &list.data[i * kOperands], sizeof tensor.data);
    tensor.count = list.counts[i];
    tensor.first_block = unsigned(blocks);
    tensor.number = list.numbers[i];
    blocks += more;
  }
  if (batch.size > 0) flush();
  return error;
}

}  // namespace fastnn::cuda
