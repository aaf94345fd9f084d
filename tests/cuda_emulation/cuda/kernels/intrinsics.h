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

inline void start_copy(void* shared, const void* global, bool valid) {
  cuda_emulation::start_copy(shared, valid ? global : nullptr);
}
inline void commit_copies() { cuda_emulation::commit_copies(); }
template <int kGroups>
void wait_for_copies() {
  cuda_emulation::wait_for_copies(kGroups);
}

template <bool kTransposed>
void load_matrices(unsigned (&matrices)[4], const void* row, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  cuda_emulation::load_matrices(kTransposed, matrices, row, file, line);
}

template <class T>
void multiply_add_matrices(float (&sums)[4], const unsigned (&a)[4], const unsigned* b,
                           const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const auto wide = [](unsigned pair, int half) { return to_accumulator(T{uint16_t(pair >> 16 * half)}); };
  float values[12];
  for (int i = 0; i < 8; ++i) values[i] = wide(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) values[8 + i] = wide(b[i / 2], i % 2);
  cuda_emulation::multiply_add_matrices(sums, values, file, line);
}

}  // namespace fastnn::cuda
