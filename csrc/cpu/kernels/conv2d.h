// Interface of the CPU convolution kernels, torch-free. Two problems serve the three passes:
//
//   TapConv     out[m, y, x] = bias[m] + sum over channel c and tap t of weight[m, c, t] * plane[c, t](y, x)
//               forward: the taps are the filter's positions, the planes the padded input.
//               gradient of the input: the channels are the output's, the planes the padded output gradient; a stride
//               splits the result into stride_h * stride_w phases, each a TapConv of the taps that reach it, and
//               planes are packed once for all of them.
//   TapGrad     weight_grad[m, c, t] = sum over n, y, x of out_grad[m, y, x] * plane[c, t](y, x)
//
// A plane is one channel of the source, padded, in the accumulator type (or a pair of channels, where the tier
// multiplies those: Operand in vec.h): plane row i of phase (a, b) is source row i * step_h + a - origin_h (columns
// alike), zero outside the source. A strided convolution's taps then read runs of neighbours, whatever the stride,
// dilation and padding: tap t's operand at flat position p is plane[p + offset(t)].
#pragma once

#include <cstdint>

#include "common/conv_shape.h"
#include "common/dtype.h"

namespace fastnn::cpu {

// What planes are packed from. A gradient may still lack its ReLU mask (relu_output), which is applied while packing.
struct ConvSource {
  const void* data;
  Strides4 stride;
  int64_t height, width;
  const void* relu_output;
  Strides4 relu_stride;
};

struct ConvResult {
  void* data;
  Strides4 stride;
  uint8_t* pool_code;
  Strides4 code_stride;
  PoolShape pool;
};

constexpr int64_t kMaxPhases = 64;

constexpr int64_t kShortDepth = 64;  // a reduction over fewer operands and taps than these is short

// How planes are laid out and how a task's share is cut; filled in by plan_planes().
struct Planes {
  int64_t step_h, step_w, origin_h, origin_w;
  int64_t phases;  // (a, b) pairs that some tap reads
  int64_t phase_h[kMaxPhases], phase_w[kMaxPhases];
  int64_t halo_h, halo_w;            // the largest tap offsets
  int64_t pitch;                     // elements between plane rows
  int64_t block_rows, block_images;  // a task's output rows and images, at most
  int64_t plane;                     // elements a channel takes, all phases
};

struct Tap {
  int64_t phase, row, col;  // plane[c][phase] shifted by (row, col)
  int64_t weight;           // its offset in the weight tensor, elements
};

struct TapConv {
  ConvSource source;
  ConvResult result;
  Planes planes;
  Tap* taps;  // row by row
  int64_t num_taps;
  int64_t batch, groups, group_channels, group_results;
  int64_t rows, cols;  // output positions of this problem (before pooling)
  const void* bias;    // accumulator type, one per result channel, or null
  bool relu;
  const void* weight;  // packed by pack_weight
  // A task: an image block, a row block and a run of groups (or, of one large group, a run of result channels).
  int64_t image_blocks, row_blocks, channel_blocks;
  int64_t block_groups, block_results;
  int64_t panel;        // result channels kept in scratch until they are written
  int64_t block_depth;  // operands reduced at a time: a tile's then fit the L1 cache
  int64_t scratch;      // bytes a thread needs
  // Another phase of a gradient, or null: of the same plan and planes, and of no more rows.
  const TapConv* next;

  int64_t tasks() const { return image_blocks * row_blocks * channel_blocks; }
  int64_t results() const { return groups * group_results; }
  int64_t most_taps() const {
    const int64_t others = next ? next->most_taps() : 0;
    return num_taps > others ? num_taps : others;
  }
};

// What the lanes of a weight gradient's vectors are: source channels, where they are enough to fill a tile; result
// channels, where those are contiguous in memory; or positions, of which each (result channel, channel, tap) is a dot
// product.
enum class GradForm { channel_lanes, result_lanes, position_lanes };

struct TapGrad {
  ConvSource source, grad;
  Planes planes;
  const Tap* taps;
  int64_t num_taps;
  int64_t batch, groups, group_channels, group_results;
  int64_t rows, cols;
  // A task: one slice of the blocks and a run of groups (or, of one large group, of result and source channels). Slices
  // are cut by shape alone and summed in order, so the result does not depend on the thread count.
  int64_t image_blocks, row_blocks, slices, channel_blocks;
  int64_t block_groups, block_results, block_channels;
  GradForm form;  // block_groups is 1 unless position_lanes
  int64_t scratch;
  void* weight_sums;  // [slices][sum_index()]
  void* bias_sums;    // [slices][groups * group_results], or null

  // Where the sum of result channel m (of all groups), source channel c and tap t is: the lanes are neighbours.
  int64_t sum_index(int64_t m, int64_t c, int64_t t) const {
    if (form == GradForm::result_lanes)
      return ((m / group_results * group_channels + c) * num_taps + t) * group_results + m % group_results;
    return m * group_channels * num_taps +
           (form == GradForm::channel_lanes ? t * group_channels + c : c * num_taps + t);
  }
  // The slice and channels of a task: `groups` groups from `group` on, of each `results` result channels from `result`
  // on and `channels` source channels from `channel` on.
  struct Task {
    int64_t slice, group, groups, result, results, channel, channels;
  };
  Task task(int64_t index) const {
    const int64_t result_splits = (group_results + block_results - 1) / block_results;
    const int64_t channel_splits = (group_channels + block_channels - 1) / block_channels;
    Task t;
    t.slice = index / channel_blocks;
    t.channel = index % channel_splits * block_channels;
    t.result = index % channel_blocks / channel_splits % result_splits * block_results;
    t.group = index % channel_blocks / (channel_splits * result_splits) * block_groups;
    t.groups = block_groups < groups - t.group ? block_groups : groups - t.group;
    t.results = block_results < group_results - t.result ? block_results : group_results - t.result;
    t.channels = block_channels < group_channels - t.channel ? block_channels : group_channels - t.channel;
    return t;
  }
  int64_t offset_bytes() const { return (block_channels * num_taps + block_results + 8) / 8 * 64; }

  int64_t tasks() const { return slices * channel_blocks; }
};

struct ConvKernels {
  int lanes[2];           // of float64, float32 vectors
  int terms[kNumDTypes];  // of a sum that are multiplied as one operand
  int tile_results;       // result channels of TapConv's widest tile
  int lane_vectors;       // and vectors of an outer product's
  // Packs rows [begin, end) of m-blocks of a weight viewed as [group][m][c][tap] into the order the tiles read.
  // strides: of group, m and c, elements.
  void (*pack_weight[kNumDTypes])(const TapConv&, const void* weight, const int64_t* strides, void* packed,
                                  int64_t begin, int64_t end);
  void (*run[kNumDTypes])(const TapConv&, void* scratch, int64_t begin, int64_t end);
  void (*run_grad[kNumDTypes])(const TapGrad&, void* scratch, int64_t begin, int64_t end);
  // Adds elements [begin, end) of `slices` lists of `size` sums up in the first; and writes the gradients of result
  // channels [begin, end) from there.
  void (*add_slices[kNumDTypes])(void* sums, int64_t slices, int64_t size, int64_t begin, int64_t end);
  void (*write_sums[kNumDTypes])(const TapGrad&, void* out, void* bias_out, int64_t begin, int64_t end);
  void (*to_accumulator[kNumDTypes])(const void* in, int64_t stride, void* out, int64_t count);
};

const ConvKernels& conv_kernels();

}  // namespace fastnn::cpu
