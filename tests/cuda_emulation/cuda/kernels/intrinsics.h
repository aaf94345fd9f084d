// The CPU's definition of every function in csrc/cuda/kernels/intrinsics.h.
#pragma once

#include <cuda_runtime.h>

#include "common/dtype.h"

namespace fastnn::cuda {

#define FASTNN_DEVICE_ASSERT(condition)                                                                    \
  do {                                                                                                     \
    if (!(condition)) cuda_emulation::fault(cudaErrorAssert, "device-side assert triggered: " #condition); \
  } while (false)

template <class T>
Accumulator<T> widen(T value) {
  return to_accumulator(value);
}
template <class T>
T narrow(Accumulator<T> value) {
  return from_accumulator<T>(value);
}

inline double exp_nonpositive(double x) { return exp(x); }
inline float exp_nonpositive(float x) { return exp2f(x * 1.4426950408889634f); }

}  // namespace fastnn::cuda
