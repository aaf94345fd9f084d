// Interface of the depthwise convolution kernels, torch-free: problems of conv2d.h with one channel a group. Vector lanes
// are neighbours in memory, of the source as of the result: columns of a row (NCHW) or channels of a pixel
// (channels_last).
#pragma once

#include "cpu/kernels/conv2d.h"

namespace fastnn::cpu {

constexpr int64_t kDepthwiseMaxTaps = 81;
constexpr int64_t kDepthwiseRows = 4, kDepthwiseGradRows = 2;  // result rows computed together
constexpr int64_t kDepthwiseSlack = 16;  // a line's elements past its last: the widest vector

// How a source's rows wait for the kernels in scratch: as lines in the accumulator type, with zeros for the padding,
// split by the column's phase. Element (phase, column, channel) is at (phase * pitch + column) * pixel + channel; a line
// of columns holds one channel.
struct DepthwiseLines {
  bool by_channel;  // lanes are channels
  int64_t origin_h, origin_w;  // as in Planes; the largest of all result phases
  int64_t pitch, pixel, size;
  int64_t count;  // lines kept: what the rows computed together read

  int64_t pointer_bytes() const { return (count * int64_t(sizeof(void*)) + 63) / 64 * 64; }
  // The lines, one more of zeros, and a table of pointers to lines.
  int64_t bytes(int64_t element) const { return pointer_bytes() + (count + 1) * size * element; }
};

// A task: some rows of an image, and a run of channels.
struct DepthwiseConv {
  const TapConv* phases;  // of the result, [up_h][up_w], each written up_h rows and up_w columns apart
  int64_t up_h, up_w;
  DepthwiseLines lines;
  int64_t rows, cols;  // of the largest phase
  int64_t block_rows, row_blocks, block_channels, channel_blocks;

  int64_t tasks() const { return phases->batch * row_blocks * channel_blocks; }
};

// A task: a slice of all images' rows, and a run of channels.
struct DepthwiseGrad {
  const TapGrad* problem;
  DepthwiseLines lines, grad_lines;
  int64_t block_channels, channel_blocks;

  int64_t tasks() const { return problem->slices * channel_blocks; }
};

struct DepthwiseKernels {
  // Packs the weight as [tap][channel], channels padded to whole vectors. stride: of the channel.
  void (*pack_weight[kNumDTypes])(const TapConv&, const void* weight, int64_t stride, void* packed);
  void (*run[kNumDTypes])(const DepthwiseConv&, void* scratch, int64_t begin, int64_t end);
  void (*run_grad[kNumDTypes])(const DepthwiseGrad&, void* scratch, int64_t begin, int64_t end);
};

const DepthwiseKernels& depthwise_kernels();

}  // namespace fastnn::cpu
