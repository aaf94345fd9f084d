// Gradients of conv -> ReLU -> max-pool from the pooled gradient: the interface of conv2d_pooled_tier.h. Torch-free.
#pragma once

#include <cstdint>

#include "common/conv_shape.h"
#include "common/dtype.h"

namespace fastnn::cpu {

// Pixels of the input are packed channels innermost, `width` together, in rows padded on both sides.
struct PooledGrad {
  ConvShape conv;
  PoolShape pool;
  const void* grad;
  const uint8_t* code;
  Strides4 grad_stride, code_stride;
  void* pixels;  // the input (weight gradient), or where its gradient goes
  Strides4 pixel_stride;
  int64_t width;                                  // channels
  int64_t block_rows, block_cols, block_results;  // windows and result channels taken at a time
  int64_t pixel_elements, scratch;                // a thread's packed pixels, and bytes in all
  // The weight gradient: a task is block_results result channels and one of the slices of the pooled rows of all
  // images, which are cut by shape alone and packed pack_rows at a time.
  int64_t pack_rows, slices, list_capacity;
  void* weight_sums;  // [slices][out_channels][result_sums]
  void* bias_sums;    // [slices][out_channels]
  bool* finite;       // of a task: whether the input was, without which the sums lack infinity times zero
  // The input gradient: a task is one of row_blocks of an image.
  int64_t row_blocks;
  const void* weight;  // packed by pack_weight

  int64_t codes() const { return pool.kernel_h * pool.kernel_w; }
  int64_t pitch() const { return conv.pad_left + conv.in_w + conv.pad_right; }
  // Taps that are neighbours in memory, and how many such runs a filter has.
  int64_t run_taps() const { return conv.dilation_w == 1 ? conv.kernel_w : 1; }
  int64_t runs() const { return conv.kernel_h * conv.kernel_w / run_taps(); }
  // Input rows and columns from one window to the next, and the rows a window reaches.
  int64_t row_step() const { return pool.stride_h * conv.stride_h; }
  int64_t col_step() const { return pool.stride_w * conv.stride_w; }
  int64_t span_h() const { return (pool.kernel_h - 1) * conv.stride_h + (conv.kernel_h - 1) * conv.dilation_h + 1; }
  // Elements of a result channel's filter, every run of every chunk of channels padded to whole vectors.
  int64_t result_sums(int64_t lanes) const {
    const int64_t chunks = conv.group_in() / width, rest = conv.group_in() % width;
    const auto run = [&](int64_t channels) { return (run_taps() * channels + lanes - 1) / lanes * lanes; };
    return runs() * (chunks * run(width) + run(rest));
  }
};

struct PooledKernels {
  void (*run_weight[kNumDTypes])(const PooledGrad&, void* scratch, int64_t begin, int64_t end);
  void (*write_sums[kNumDTypes])(const PooledGrad&, void* weight_grad, void* bias_grad, int64_t begin, int64_t end);
  // Blocks [begin, end) of block_results result channels of each group; strides: of result channel, channel, row and
  // column. Returns whether the weights are finite.
  bool (*pack_weight[kNumDTypes])(const PooledGrad&, const void* weight, const int64_t* strides, void* packed,
                                  int64_t begin, int64_t end);
  // Tasks [begin, end) of batch * row_blocks.
  void (*run_input[kNumDTypes])(const PooledGrad&, void* scratch, int64_t begin, int64_t end);
  // The plain gradient of the convolution's result, contiguous: planes [begin, end) of batch * out_channels.
  void (*scatter[kNumDTypes])(const PooledGrad&, void* plain, int64_t begin, int64_t end);
};

const PooledKernels& pooled_kernels();

}  // namespace fastnn::cpu
