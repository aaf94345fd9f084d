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

// A struct that goes from memory straight into a function's argument.
struct Four {
  float values[4];
};
__device__ Four sum_of_warp(Four four) {
  for (float& value : four.values)
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return four;
}
__global__ void struct_as_argument(float* data) {
  __shared__ Four fours[kThreads];
  fours[threadIdx.x] = {data[threadIdx.x]};
  data[threadIdx.x] = sum_of_warp(fours[threadIdx.x ^ 32]).values[0];
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

// Every warp copies 4 floats a thread into shared memory and reads them, or its other half's. kGroups: that may be
// left.
template <bool kCommit, int kGroups, bool kBarrier, int kDistance>
__global__ void copy(float* data) {
  using namespace fastnn::cuda;
  __shared__ Pack<float, 4> packs[kThreads];
  start_copy(&packs[threadIdx.x], data + threadIdx.x / 4 * 4, threadIdx.x % 4 == 0);
  if (kCommit) commit_copies();
  __syncthreads();
  wait_for_copies<kGroups>();
  if (kBarrier) __syncthreads();
  const Pack<float, 4> pack = packs[threadIdx.x ^ kDistance];
  __syncthreads();
  float sum = 0;
  for (float value : pack.values) sum += value;
  packs[threadIdx.x].values[0] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kThreads; ++i) packs[0].values[0] += packs[i].values[0];
  data[0] = packs[0].values[0];
}

__global__ void copy_over_what_is_read(float* data) {
  __shared__ fastnn::cuda::Pack<float, 4> packs[kThreads];
  packs[threadIdx.x].values[0] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = packs[threadIdx.x ^ 1].values[0];
  fastnn::cuda::start_copy(&packs[threadIdx.x], data, false);
  fastnn::cuda::commit_copies();
  fastnn::cuda::wait_for_copies<0>();
}

__global__ void copy_left_behind(float* data) {
  __shared__ fastnn::cuda::Pack<float, 4> packs[kThreads];
  fastnn::cuda::start_copy(&packs[threadIdx.x], data, true);
  fastnn::cuda::commit_copies();
}

__global__ void misaligned_copy(float* data) {
  __shared__ fastnn::cuda::Pack<float, 4> packs[kThreads];
  fastnn::cuda::start_copy(&packs[threadIdx.x], data + 1, true);
}

// Whether 16 x 16 times 16 x 8, written row by row, is what a plain loop makes of it: the sum of data, or something
// else.
template <bool kAll>
__global__ void multiply(float* data) {
  using namespace fastnn::cuda;
  __shared__ Pack<bf16, 8> a[16][2], b[16];
  const auto value = [](int row, int column) { return float((row * 5 + column * 3) % 7 - 3); };
  if (threadIdx.x < 16)
    for (int c = 0; c < 16; ++c) {
      a[threadIdx.x][c / 8].values[c % 8] = narrow<bf16>(value(int(threadIdx.x), c));
      if (c < 8) b[threadIdx.x].values[c] = narrow<bf16>(value(int(threadIdx.x) + 1, c));
    }
  __syncthreads();
  const int lane = int(threadIdx.x) % 32;
  unsigned of_a[4], of_b[4];
  load_matrices<false>(of_a, &a[lane % 16][lane / 16]);
  load_matrices<true>(of_b, &b[lane % 16]);
  float sums[4] = {};
  if (kAll || lane > 0) multiply_add_matrices<bf16>(sums, of_a, of_b);
  bool right = true;
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += value(lane / 4 + i / 2 * 8, k) * value(k + 1, lane % 4 * 2 + i % 2);
    right = right && sum == sums[i];
  }
  if (right) data[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < kThreads; ++i) data[0] += data[i];
  if (threadIdx.x == 0 && data[0] == 0) data[0] = kThreads * (kThreads - 1) / 2;
}

__global__ void operand_not_rounded(float* data) {
  const unsigned third = 0x3eaaaaab, of_a[4] = {third}, of_b[2] = {};
  float sums[4] = {};
  fastnn::cuda::multiply_add_matrices<float>(sums, of_a, of_b);
  data[threadIdx.x] = sums[0];
}

struct Case {
  const char* name;
  void (*kernel)(float*);
};
const Case kCases[] = {
    {"right sum", sum<true, true>},
    {"right warp sum", right_warp_sum},
    {"right exchange in warp", exchange<1, true>},
    {"right neighbours", right_neighbours},
    {"right sum of copies", copy<true, 0, true, 32>},
    {"right sum of copies in thread", copy<true, 0, false, 0>},
    {"right sum of matrices", multiply<true>},
    {"no commit", copy<false, 0, true, 32>},
    {"no wait", copy<true, 1, true, 32>},
    {"no barrier after wait", copy<true, 0, false, 32>},
    {"copy over what is read", copy_over_what_is_read},
    {"copy left behind", copy_left_behind},
    {"misaligned copy", misaligned_copy},
    {"matrices in branch", multiply<false>},
    {"operand not rounded", operand_not_rounded},
    {"no first barrier", sum<false, true>},
    {"no other barriers", sum<true, false>},
    {"no warp barrier", exchange<1, false>},
    {"warp barrier between warps", exchange<32, true>},
    {"struct as argument", struct_as_argument},
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
