// Compiles the file named by FASTNN_TIER_SOURCE once per instruction set, each in a namespace of its own together with
// the vector type of that width (vec.h), and defines FASTNN_TIER(name): the `name` of the tier in use. Where
// FASTNN_BF16_TIER is 1, that is avx512_bf16 too, for products of bfloat16; it is avx512 in its stead otherwise.
//
// Inside a tier's file: no #include (put them in the .cpp, before this header), no lambda (it would not inherit the
// target), no non-inlined std:: template.
#include "cpu/isa.h"
#include "cpu/kernels/platform.h"

#if FASTNN_X86

#if FASTNN_BF16_TIER
FASTNN_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define FASTNN_VECTOR_BYTES 64
#define FASTNN_BF16_PRODUCTS 1
namespace fastnn::cpu::avx512_bf16 {
#include "cpu/kernels/vec.h"
#include FASTNN_TIER_SOURCE
}  // namespace fastnn::cpu::avx512_bf16
#undef FASTNN_VECTOR_BYTES
#undef FASTNN_BF16_PRODUCTS
FASTNN_END_TARGET
#define FASTNN_TIER_OF_BF16(name) fastnn::cpu::avx512_bf16::name
#else
#define FASTNN_TIER_OF_BF16(name) fastnn::cpu::avx512::name
#endif
#define FASTNN_BF16_PRODUCTS 0

FASTNN_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FASTNN_VECTOR_BYTES 64
namespace fastnn::cpu::avx512 {
#include "cpu/kernels/vec.h"
#include FASTNN_TIER_SOURCE
}  // namespace fastnn::cpu::avx512
#undef FASTNN_VECTOR_BYTES
FASTNN_END_TARGET

FASTNN_BEGIN_TARGET("avx2,fma,f16c")
#define FASTNN_VECTOR_BYTES 32
namespace fastnn::cpu::avx2 {
#include "cpu/kernels/vec.h"
#include FASTNN_TIER_SOURCE
}  // namespace fastnn::cpu::avx2
#undef FASTNN_VECTOR_BYTES
FASTNN_END_TARGET

#define FASTNN_TIER(name)                                        \
  (current_isa() == Isa::kAvx512Bf16 ? FASTNN_TIER_OF_BF16(name) \
   : current_isa() == Isa::kAvx512   ? fastnn::cpu::avx512::name \
   : current_isa() == Isa::kAvx2     ? fastnn::cpu::avx2::name   \
                                     : fastnn::cpu::generic::name)
#else
#define FASTNN_BF16_PRODUCTS 0
#define FASTNN_TIER(name) (fastnn::cpu::generic::name)
#endif

#define FASTNN_VECTOR_BYTES 16
namespace fastnn::cpu::generic {
#include "cpu/kernels/vec.h"
#include FASTNN_TIER_SOURCE
}  // namespace fastnn::cpu::generic
#undef FASTNN_VECTOR_BYTES
