// Windows of neighbouring pixels as rows of a matrix product: the interface of conv2d_pointwise_tier.h. Torch-free.
#pragma once

#include "cpu/kernels/conv2d.h"

namespace fastnn::cpu {

// conv.taps are those of a window, row by row. A task: block_rows rows of an image's results, block_cols columns at a
// time, or, by column, as many results as a panel has columns, of all rows and images in a row; and a share of the
// blocks of result channels.
struct PointConv {
  TapConv conv;
  int64_t window_h, window_w;
  bool padded;     // some window reaches past the source
  bool by_column;  // vectors are pixels, not results
  int64_t block_rows, block_cols;
  int64_t scratch;

  int64_t tasks() const { return conv.tasks(); }
};

// A gradient of the input without stride or dilation, one group, from the other side: an output pixel's products with
// all of the weight are spread over the window of input pixels that it reached. Where there is no padding, many more
// input pixels than output pixels have products, mostly of nothing. conv: the output's gradient, rows and columns; a
// task is an image.
struct PointSpread {
  TapConv conv;
  int64_t kernel_h, kernel_w, pad_top, pad_left, height, width;  // the latter of the result
  int64_t scratch;

  int64_t tasks() const { return conv.batch; }
  // Vectors of a row of the window, and panels of all rows, where a vector has `lanes`.
  int64_t row_vectors(int64_t lanes) const { return (kernel_w * conv.group_results + lanes - 1) / lanes; }
  int64_t panels(int64_t lanes) const { return (kernel_h * row_vectors(lanes) + 1) / 2; }
  int64_t sums_width() const { return conv.cols + kernel_w - 1; }
};

struct PointwiseKernels {
  int panel[2];  // elements of a panel's two vectors, of float64 and float32,
  int rows;      // and rows of a tile; a block of results is the one in channels_last, the other in NCHW
  // Blocks [begin, end) of `width` results; strides: of group, result and channel.
  void (*pack_weight[kNumDTypes])(const PointConv&, int64_t width, const void* weight, const int64_t* strides,
                                  void* packed, int64_t begin, int64_t end);
  void (*run[kNumDTypes])(const PointConv&, void* scratch, int64_t begin, int64_t end);
  // Panels [begin, end); strides: of result, channel, and the window's row and column.
  void (*pack_spread_weight[kNumDTypes])(const PointSpread&, const void* weight, const int64_t* strides, void* packed,
                                         int64_t begin, int64_t end);
  void (*run_spread[kNumDTypes])(const PointSpread&, void* scratch, int64_t begin, int64_t end);
};

const PointwiseKernels& pointwise_kernels();

}  // namespace fastnn::cpu
