// Interface of the depthwise convolution kernels, torch-free: problems of conv2d.h with one channel a group, and, but
// for the weight's gradient, channels_last ones with as many channels in as out, which are a part of a vector. Vector
// lanes are neighbours in memory, of the source as of the result: columns of a row (NCHW) or channels of a pixel
// (channels_last).
#pragma once

#include "cpu/kernels/conv2d.h"

namespace fastnn::cpu {

constexpr int64_t kDepthwiseMaxTaps = 81;
constexpr int64_t kDepthwiseMaxGroup = 8;  // channels of a group
constexpr int64_t kDepthwiseRows = 4;      // result rows computed together,
constexpr int64_t kDepthwiseSpan = 2;      // and vectors of each
constexpr int64_t kDepthwiseVector = 16;   // elements of the widest vector

// How a source's rows wait for the kernels in scratch: as lines in the accumulator type, with zeros for the padding,
// split by the column's phase. A line of columns holds one channel.
struct DepthwiseLines {
  bool by_channel;             // lanes are channels
  int64_t step_h, step_w;      // as in Planes
  int64_t origin_h, origin_w;  // as in Planes; the largest of all result phases
  int64_t columns;             // of a phase
  int64_t pitch, pixel, size;  // elements between phases (by_channel: pixels), between pixels, and of a line
  int64_t rows;                // result rows whose source rows are there at once, a multiple of kDepthwiseRows
  int64_t table_rows;          // the source rows they read, of each phase of rows
  int64_t ring;                // lines kept
  // Result columns whose taps are all inside a channels_last source of whole vectors read it where it is; lines are
  // for the others, and leave out source columns [skip_begin, skip_end).
  int64_t in_place_begin, in_place_end, skip_begin, skip_end;

  bool reads_in_place() const { return in_place_end > in_place_begin; }

  // The first column of a phase that is inside the source.
  int64_t first(int64_t phase) const { return phase < origin_w ? (origin_w - phase + step_w - 1) / step_w : 0; }
  // The element of a line where a column is, or a pixel's first channel. The first inside is at a vector's boundary.
  int64_t at(int64_t phase, int64_t column) const {
    if (by_channel) return (phase * pitch + column) * pixel;
    return phase * pitch + column + (kDepthwiseVector - first(phase) % kDepthwiseVector) % kDepthwiseVector;
  }
  int64_t table_bytes() const { return (2 * step_h * table_rows * int64_t(sizeof(void*)) + 63) / 64 * 64; }
  // The ring, a line of zeros, and two tables of pointers: to lines, and to the source's rows.
  int64_t bytes(int64_t element) const { return table_bytes() + (ring + 1) * size * element; }
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
  bool grad_in_place;  // the output gradient is read where it is
  int64_t block_channels, channel_blocks;

  int64_t tasks() const { return problem->slices * channel_blocks; }
};

struct DepthwiseKernels {
  // Packs the weight as [tap][channel of the group][result channel], and a row more, result channels padded to whole
  // vectors. strides: of group, result and channel.
  void (*pack_weight[kNumDTypes])(const DepthwiseLines&, const TapConv&, const void* weight, const int64_t* strides,
                                  void* packed);
  void (*run[kNumDTypes])(const DepthwiseConv&, void* scratch, int64_t begin, int64_t end);
  void (*run_grad[kNumDTypes])(const DepthwiseGrad&, void* scratch, int64_t begin, int64_t end);
};

const DepthwiseKernels& depthwise_kernels();

}  // namespace fastnn::cpu
