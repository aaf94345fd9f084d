// Wrong kernels, each of which the emulation has to see, and right ones that look like them, which it has to let pass.
// The program runs the one it is told to and prints what became of it; test_cuda_emulation.py says what that must be.
#include <cuda_runtime.h>

#include <cstdio>
#include <memory>

#include "common/dtype.h"
#include "cuda/kernels/launch.h"

namespace {

using fastnn::bf16;

constexpr int kThreads = 64;

// The sum of all threads' values in thread 0, by halving.
template <bool kFirstBarrier, bool kOtherBarriers>
__global__ void sum(float* data) {
  __shared__ float partial[kThreads];
  partial[threadIdx.x] = data[threadIdx.x];
  if (kFirstBarrier) __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    if (kOtherBarriers) __syncthreads();
  }
  if (threadIdx.x == 0) data[0] = partial[0];
}

__global__ void right_warp_sum(float* data) {
  float value = data[threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  __shared__ float partial[2];
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) data[0] = partial[0] + partial[1];
}

// Every thread reads the value of another, kDistance away; a barrier of each warp is none between warps.
template <int kDistance, bool kBarrier>
__global__ void exchange(float* data) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = data[threadIdx.x];
  if (kBarrier) __syncwarp();
  data[threadIdx.x] = values[threadIdx.x ^ kDistance];
}

__global__ void barrier_in_branch(float* data) {
  if (threadIdx.x < 32) __syncthreads();
  data[threadIdx.x] = 0;
}

__global__ void barriers_in_both_branches(float* data) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  data[threadIdx.x] = 0;
}

__global__ void shuffle_in_branch(float* data) {
  if (threadIdx.x % 2) data[threadIdx.x] = __shfl_sync(~0u, data[threadIdx.x], 0);
}

__global__ void shuffle_from_outside(float* data) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_sync(0xffffu, data[threadIdx.x], 20);
}

__global__ void write_of_one_address(float* data) { data[0] = float(threadIdx.x); }

__global__ void write_after_read(float* data) {
  const float next = data[(threadIdx.x + 1) % kThreads];
  data[threadIdx.x] = next;
}

// Neighbouring 16-bit elements are no race.
__global__ void right_neighbours(float* data) {
  auto* halves = reinterpret_cast<bf16*>(data);
  halves[threadIdx.x] = bf16{uint16_t(halves[threadIdx.x].bits + 1)};
}

__global__ void between_blocks(float* data) {
  data[blockIdx.x * kThreads + threadIdx.x] = data[(blockIdx.x + 1) % 2 * kThreads + threadIdx.x];
}

__global__ void uninitialised(float* data) {
  __shared__ float values[kThreads];
  if (threadIdx.x != 5) values[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x] = values[threadIdx.x];
}

__global__ void left_by_another_block(float* data) {
  __shared__ float value;
  if (blockIdx.x == 0 && threadIdx.x == 0) value = 1;
  __syncthreads();
  data[blockIdx.x * kThreads + threadIdx.x] = value;
}

__global__ void out_of_bounds(float* data) { data[threadIdx.x + 1 + kThreads] = 0; }
__global__ void out_of_bounds_read(float* data) {
  data[threadIdx.x] = fastnn::cuda::load_pack<4>(data + 2 * kThreads - 4 + threadIdx.x / 63 * 4).values[0];
}
__global__ void out_of_shared_bounds(float* data) {
  __shared__ float values[kThreads];
  values[threadIdx.x + 1] = 1;
  data[threadIdx.x] = values[threadIdx.x + 1];
}
__global__ void misaligned(float* data) {
  fastnn::cuda::store_pack(data + 1 + 4 * threadIdx.x % kThreads, fastnn::cuda::Pack<float, 4>{});
}
__global__ void device_assert(float* data) { FASTNN_DEVICE_ASSERT(data[threadIdx.x] < 63); }

struct Case {
  const char* name;
  void (*kernel)(float*);
};
const Case kCases[] = {
    {"right sum", sum<true, true>},
    {"right warp sum", right_warp_sum},
    {"right exchange in warp", exchange<1, true>},
    {"right neighbours", right_neighbours},
    {"no first barrier", sum<false, true>},
    {"no other barriers", sum<true, false>},
    {"no warp barrier", exchange<1, false>},
    {"warp barrier between warps", exchange<32, true>},
    {"barrier in branch", barrier_in_branch},
    {"barriers in both branches", barriers_in_both_branches},
    {"shuffle in branch", shuffle_in_branch},
    {"shuffle from outside", shuffle_from_outside},
    {"write of one address", write_of_one_address},
    {"write after read", write_after_read},
    {"between blocks", between_blocks},
    {"uninitialised", uninitialised},
    {"left by another block", left_by_another_block},
    {"out of bounds", out_of_bounds},
    {"out of bounds read", out_of_bounds_read},
    {"out of shared bounds", out_of_shared_bounds},
    {"misaligned", misaligned},
    {"device assert", device_assert},
};

// A launch of two blocks over fresh data, 0, 1, 2, ..; data[0] afterwards.
void run(const Case& c, float* first) {
  const auto data = std::make_unique<float[]>(2 * kThreads);
  for (int i = 0; i < 2 * kThreads; ++i) data[i] = float(i);
  const bool two_blocks = strstr(c.name, "block");
  const cudaError_t error = fastnn::cuda::launch(c.kernel, two_blocks ? 2 : 1, kThreads, nullptr, data.get());
  *first = data[0];
  printf("%s\n", error == cudaSuccess ? "passed" : cudaGetErrorString(error));
}

}  // namespace

int main(int argc, char** argv) {
  for (const Case& c : kCases) {
    if (argc != 2 || strcmp(argv[1], c.name)) continue;
    float first;
    run(c, &first);
    if (strstr(c.name, "sum") && strstr(c.name, "right") && first != kThreads * (kThreads - 1) / 2)
      printf("wrong sum\n");
    float again;
    run(kCases[0], &again);  // the machine works after a fault
    if (again != kThreads * (kThreads - 1) / 2) printf("wrong sum afterwards\n");
    return 0;
  }
  return 1;
}
