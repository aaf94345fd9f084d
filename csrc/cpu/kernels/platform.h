// What the kernels need to know of the compiler and the machine it compiles for. Torch-free.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTNN_X86 1
#include <immintrin.h>
#else
#define FASTNN_X86 0
#endif

#define FASTNN_INLINE inline __attribute__((always_inline))

// Every function defined between BEGIN_TARGET and END_TARGET is compiled for the named instruction sets, and only
// those are: a whole-file -mavx512f would also reach inline functions of the standard library, which the linker may
// then keep for everyone (SIGILL on older machines).
#define FASTNN_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTNN_BEGIN_TARGET(isas) \
  FASTNN_PRAGMA(clang attribute push(__attribute__((target(isas))), apply_to = function))
#define FASTNN_END_TARGET FASTNN_PRAGMA(clang attribute pop)
#else
#define FASTNN_BEGIN_TARGET(isas) FASTNN_PRAGMA(GCC push_options) FASTNN_PRAGMA(GCC target(isas))
#define FASTNN_END_TARGET FASTNN_PRAGMA(GCC pop_options)
#endif
