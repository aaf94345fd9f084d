// Launchers of the CUDA convolution kernels.
//
// Every pass is one of two problems. ConvProblem computes a result at (n, row, col) from the source at
//   (n, rows.first + row * rows.step + i * rows.tap, cols.first + col * cols.step + j * cols.tap)
// for taps (i, j): the convolution itself, and for each phase of the stride its gradient with respect to the input, of
// which the source is the gradient of the output. GradWeightProblem sums products of the two over all (n, row, col).
#pragma once

#include <cuda_runtime_api.h>

#include "common/conv_shape.h"
#include "common/dtype.h"

namespace fastnn::cuda {

// A tensor that a pass reads, 0 outside of its planes of height x width.
struct ConvSource {
  const void* data;
  Strides4 stride;
  int height, width;
  // Where given: 0 wherever this is <= 0.
  const void* relu_output = nullptr;
  Strides4 relu_stride = {};
  // Where given: `data` and this are those of the max-pooled tensor.
  const uint8_t* pool_code = nullptr;
  Strides4 code_stride = {};
  PoolShape pool = {};
};

// Where along a dimension the taps of a position are: at first + position * step + i * tap.
struct Reach {
  int first, step, tap, taps;
};

struct ConvGeometry {
  ConvSource source;
  Reach rows, cols;
  int64_t batch;
  int result_rows, result_cols;
  int groups, group_channels, group_results;
  bool tf32;  // float's products may be of numbers rounded to TF32
};

struct ConvProblem : ConvGeometry {
  const void* weight = nullptr;
  int64_t weight_group = 0, weight_result = 0, weight_channel = 0;  // strides, and of neighbouring taps'
  int64_t weight_row = 0, weight_col = 0;
  const void* bias = nullptr;  // or none
  int64_t bias_stride = 0;
  bool relu = false;
  void* result = nullptr;
  Strides4 result_stride = {};
  // Where given: the result is max-pooled, and this, of the same strides, says which element of its window each was.
  uint8_t* pool_code = nullptr;
  PoolShape pool = {};
};

// Whether launch_conv can pool. If not, launch_pool does.
bool pools_results(DType dtype, const ConvProblem& problem);
int64_t conv_scratch_bytes(DType dtype, const ConvProblem& problem);
cudaError_t launch_conv(DType dtype, const ConvProblem& problem, void* scratch, cudaStream_t stream);

// What ReLU left, max-pooled.
struct PoolProblem {
  const void* source;
  Strides4 source_stride;
  int64_t batch;
  int channels;
  PoolShape pool;
  void* result;
  uint8_t* code;
  Strides4 stride;  // of result and code
};
cudaError_t launch_pool(DType dtype, const PoolProblem& problem, cudaStream_t stream);

struct GradWeightProblem : ConvGeometry {
  ConvSource grad;
  // Contiguous, or none: groups * group_results x group_channels x taps, and groups * group_results.
  void* weight_result = nullptr;
  void* bias_result = nullptr;
};

int64_t grad_weight_scratch_bytes(DType dtype, const GradWeightProblem& problem);
cudaError_t launch_grad_weight(DType dtype, const GradWeightProblem& problem, void* scratch, cudaStream_t stream);

}  // namespace fastnn::cuda
