// CUDA C++ for g++: what nvcc and the CUDA runtime give a kernel source, with its plain meaning on a CPU.
//
// A launch runs its blocks one after the other, and each thread of a block is a fiber (emulation.cpp). It ends with an
// error, whose text says what happened, where one of these is seen:
//   a barrier or a warp operation that not every thread it waits for reaches, or that they reach at different lines;
//   two threads on one byte of memory, one of them writing, with no barrier between (in shared memory or any other), or
//   two blocks of one launch;
//   a read of shared memory that the block has not written;
//   an access to shared memory while an asynchronous copy into it has not been waited for, or a thread that ends before
//   its copies do;
//   an access outside of what is allocated, as AddressSanitizer knows it.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <cstring>
#include <functional>

#define __global__
// Inlined before the compiler looks for accesses to report: it leaves out those that are an argument of a call.
#define __device__ __attribute__((always_inline))
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time. Without an initialiser the compiler puts it into .bss, by which emulation.cpp knows it.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorAssert, cudaErrorLaunchFailure };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// What went wrong in the last launch that failed.
const char* cudaGetErrorString(cudaError_t error);

namespace cuda_emulation {

struct Context {
  dim3 thread, block, block_size, grid_size;
};
extern Context context;

// Ends the launch. Does not return.
[[noreturn]] void fault(cudaError_t error, const char* format, ...);
void barrier(const char* file, int line);
void warp_barrier(unsigned mask, const char* file, int line);
// Every lane of the mask gives a value and gets that of the lane it names.
uint64_t exchange(unsigned mask, uint64_t value, int lane, const char* file, int line);
// What intrinsics.h describes; a copy from nullptr is of zeros, and happens as late as it may: when it is waited for.
void start_copy(void* to, const void* from);
void commit_copies();
void wait_for_copies(unsigned groups);
void load_matrices(bool transposed, unsigned* matrices, const void* row, const char* file, int line);
// values: what is in the lane's 4 words of a, then in its 2 of b, `elements` in each.
void multiply_add_matrices(float* sums, const float* values, unsigned elements, const char* file, int line);
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

}  // namespace cuda_emulation

static const dim3& threadIdx = cuda_emulation::context.thread;
static const dim3& blockIdx = cuda_emulation::context.block;
static const dim3& blockDim = cuda_emulation::context.block_size;
static const dim3& gridDim = cuda_emulation::context.grid_size;

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args&&... args) {
  return cuda_emulation::run(*config, [&] { kernel(args...); });
}

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_emulation::barrier(file, line);
}
inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_emulation::warp_barrier(mask, file, line);
}

// The lane of this thread, and the lane `lane` of its group of `width`.
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int own = int(threadIdx.x % 32), group = own - own % width;
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = cuda_emulation::exchange(mask, bits, group + lane % width, file, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, int(threadIdx.x) ^ lane_mask, width, file, line);
}
