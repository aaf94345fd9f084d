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

// All bits of each half of y, two values, in which it is greater than 0 or NaN: where ReLU's gradient passes.
template <class T>
__device__ inline unsigned relu_mask(unsigned y);
template <>
__device__ inline unsigned relu_mask<f16>(unsigned y) {
  unsigned mask;
  asm("set.gtu.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(y), "r"(0));
  return mask;
}
template <>
__device__ inline unsigned relu_mask<bf16>(unsigned y) {
#if __CUDA_ARCH__ >= 900
  unsigned mask;
  asm("set.gtu.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(y), "r"(0));
  return mask;
#else
  return (__uint_as_float(y << 16) <= 0 ? 0 : 0xffff) | (__uint_as_float(y & 0xffff0000) <= 0 ? 0 : 0xffff0000);
#endif
}

// All bits of each half for which the byte `first` or the next one of `bytes` is `byte`: compared as the last digits of
// two halves of float16, 1 and a little more.
__device__ inline unsigned equal_mask(unsigned bytes, int first, int byte) {
  const unsigned halves = __byte_perm(bytes, 0x3c3c3c3c, first * 0x101 + 0x4140);
  unsigned mask;
  asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(halves), "r"(0x3c003c00 + byte * 0x10001));
  return mask;
}

// e^x of x <= 0 or NaN, absolutely accurate to 1e-7 in float: one multiplication and one special-function operation.
__device__ inline double exp_nonpositive(double x) { return exp(x); }
__device__ inline float exp_nonpositive(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}

// ---- shared memory and matrix units ----

// Starts a copy of 16 bytes from global into shared memory; of zeros, reading nothing, if not `valid`. It has happened
// once the thread has waited for the group that it committed it to; for other threads, after a barrier behind that.
__device__ inline void start_copy(void* shared, const void* global, bool valid) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread's copies but the last kGroups.
template <int kGroups>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8. It gets, of each, 4 bytes
// of row l / 4, the l % 4th; transposed, of 16-bit elements, those of rows 2 (l % 4) and the next in column l / 4.
template <bool kTransposed>
__device__ inline void load_matrices(unsigned (&matrices)[4], const void* row) {
  const unsigned from = unsigned(__cvta_generic_to_shared(row));
  if (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(from)
                 : "memory");
}

// A float to the 19 bits that the matrix units read of it: round to nearest, ties away from zero.
__device__ inline unsigned to_tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
__device__ inline unsigned to_tf32(unsigned bits) { return to_tf32(__uint_as_float(bits)); }

// sums (16 x 8) += a (16 rows of 32 bytes, as its four matrices of 8 rows of 16 bytes, column by column) * b (32 bytes
// of each of 8 columns, as its two). Floats must be TF32 numbers.
template <class T>
__device__ inline void multiply_add_matrices(float (&sums)[4], const unsigned (&a)[4], const unsigned* b);
#define FASTNN_MULTIPLY_ADD(T, shape, name)                                                                      \
  template <>                                                                                                    \
  __device__ inline void multiply_add_matrices<T>(float (&sums)[4], const unsigned (&a)[4], const unsigned* b) { \
    asm("mma.sync.aligned." shape ".row.col.f32." name "." name                                                  \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                   \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                     \
  }
FASTNN_MULTIPLY_ADD(bf16, "m16n8k16", "bf16")
FASTNN_MULTIPLY_ADD(f16, "m16n8k16", "f16")
FASTNN_MULTIPLY_ADD(float, "m16n8k8", "tf32")
#undef FASTNN_MULTIPLY_ADD

}  // namespace fastnn::cuda
