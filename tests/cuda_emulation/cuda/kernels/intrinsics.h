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
__device__ Accumulator<T> widen(T value) {
  return to_accumulator(value);
}
template <class T>
T narrow(Accumulator<T> value) {
  return from_accumulator<T>(value);
}

template <class T>
unsigned relu_mask(unsigned y) {
  const auto mask = [](unsigned half) { return to_accumulator(T{uint16_t(half)}) <= 0 ? 0 : 0xffff; };
  return unsigned(mask(y & 0xffff)) | unsigned(mask(y >> 16)) << 16;
}

inline unsigned equal_mask(unsigned bytes, int first, int byte) {
  const auto mask = [&](int index) { return int(bytes >> index * 8 & 0xff) == byte ? 0xffff : 0; };
  return unsigned(mask(first)) | unsigned(mask(first + 1)) << 16;
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

inline unsigned to_tf32(unsigned bits) {
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return is_nan ? 0x7fffe000 : (bits + 0x1000) & ~0x1fffu;
}
inline unsigned to_tf32(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return to_tf32(bits);
}

template <class T>
void multiply_add_matrices(float (&sums)[4], const unsigned (&a)[4], const unsigned* b,
                           const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  constexpr int kElements = 4 / sizeof(T);
  const auto wide = [&](unsigned word, int index) {
    T element;
    memcpy(&element, reinterpret_cast<const char*>(&word) + index * sizeof element, sizeof element);
    if (sizeof element == 4 && word & 0x1fff)
      cuda_emulation::fault(cudaErrorLaunchFailure, "%s:%d multiplies %#x, which is no TF32 number", file, line, word);
    return to_accumulator(element);
  };
  float values[6 * kElements];
  for (int i = 0; i < 6 * kElements; ++i)
    values[i] = wide(i < 4 * kElements ? a[i / kElements] : b[i / kElements - 4], i % kElements);
  cuda_emulation::multiply_add_matrices(sums, values, kElements, file, line);
}

}  // namespace fastnn::cuda
