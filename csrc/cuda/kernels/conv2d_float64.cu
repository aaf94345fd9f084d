// The matrix products of conv2d_gemm.h in float64.
#include "cuda/kernels/conv2d_gemm.h"

namespace fastnn::cuda {

FASTNN_CONV_TILES(, double)

}  // namespace fastnn::cuda
