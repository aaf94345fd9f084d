// What the kernels need of the machine beyond plain CUDA C++. Everything that is PTX or that the tests' CPU emulation
// must do in its own way is here and nowhere else: tests/cuda_emulation/cuda/kernels/intrinsics.h has the same
// functions.
#pragma once

#include <cuda_runtime.h>

#include "common/dtype.h"

extern "C" __device__ void __assertfail(const char* condition, const char* file, unsigned line, const char* function,
                                        size_t char_size);

namespace fastnn::cuda {

// Ends the whole launch, and with it the process's use of the device, with "device-side assert triggered". The trap
// tells ptxas that nothing has to be kept across the call.
#define FASTNN_DEVICE_ASSERT(condition)                                     \
  do {                                                                      \
    if (!(condition)) {                                                     \
      __assertfail(#condition, __FILE__, __LINE__, __func__, sizeof(char)); \
      __trap();                                                             \
    }                                                                       \
  } while (false)

// T to the type it is computed in, and back: round to nearest, ties to even.
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(bf16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
__device__ inline float widen(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

template <class T>
__device__ inline T narrow(Accumulator<T> value) {
  return value;
}
template <>
__device__ inline bf16 narrow<bf16>(float value) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
__device__ inline f16 narrow<f16>(float value) {
  f16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// e^x of x <= 0 or NaN, absolutely accurate to 1e-7 in float: one multiplication and one special-function operation.
__device__ inline double exp_nonpositive(double x) { return exp(x); }
__device__ inline float exp_nonpositive(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}

}  // namespace fastnn::cuda
