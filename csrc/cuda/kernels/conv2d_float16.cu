// The matrix products of conv2d_gemm.h in float16.
#include "cuda/kernels/conv2d_gemm.h"

namespace fastnn::cuda {

FASTNN_CONV_TILES(, f16)

}  // namespace fastnn::cuda
