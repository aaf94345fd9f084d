// The matrix products of conv2d_gemm.h in bfloat16.
#include "cuda/kernels/conv2d_gemm.h"

namespace fastnn::cuda {

FASTNN_CONV_TILES(, bf16)

}  // namespace fastnn::cuda
