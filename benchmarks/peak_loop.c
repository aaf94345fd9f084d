// The multiply-add peak of one core: independent chains of fused multiply-adds on registers, no memory. Compiled by
// machine.py with -march=native, once with REAL=float and once with REAL=double.
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

typedef REAL vec __attribute__((vector_size(BYTES)));
enum { CHAINS = 10, LANES = BYTES / sizeof(REAL) };

// Runs `steps` steps of CHAINS vector multiply-adds and returns how many floating-point operations that was.
double fma_loop(long steps, REAL* sink) {
  vec acc[CHAINS], factor = {0}, term = {0}, sum = {0};
  factor += (REAL)0.999;
  term += (REAL)0.001;
#pragma GCC unroll 10
  for (int c = 0; c < CHAINS; ++c) acc[c] = factor * (REAL)c;
  for (long s = 0; s < steps; ++s)
#pragma GCC unroll 10
    for (int c = 0; c < CHAINS; ++c) acc[c] = acc[c] * factor + term;
#pragma GCC unroll 10  // a chain that is indexed at run time would live in memory
  for (int c = 0; c < CHAINS; ++c) sum += acc[c];
  for (int lane = 0; lane < LANES; ++lane) sink[0] += sum[lane];
  return 2.0 * steps * CHAINS * LANES;
}
