// Interface of Winograd's convolution, torch-free: a TapConv or TapGrad whose taps are a 3 x 3 window moving by one.
#pragma once

#include "cpu/kernels/conv2d.h"

namespace fastnn::cpu {

// Products are transformed tiles: 2 x 2 results out of 4 x 4 of the source, or 4 x 4 out of 6 x 6 (one pooling window,
// or four, where the result is pooled). Tiles are counted along a row of tiles, then down an image, then over the
// batch.
struct WinogradConv {
  TapConv conv;                  // its planes give the geometry only, its weight is as given, [group][m][c][tap]
  int64_t weight_strides[3];     // of group, m and c, elements
  const void* packed;            // by pack_weight below; null: a task packs what it uses
  int64_t side;                  // of a tile, results: 2 or 4
  int64_t tile_rows, tile_cols;  // of an image
  int64_t block_tiles;           // a task's tiles, at most; forward, a multiple of gemm_tiles
  int64_t group_runs;            // runs of gemm_results result channels in a group ...
  int64_t block_runs;            // ... and in a task, at most
  int64_t run_product;           // elements of a run's weights for one product
  int64_t scratch;               // bytes a thread needs

  int64_t products() const { return (side + 2) * (side + 2); }
  int64_t tiles() const { return conv.batch * tile_rows * tile_cols; }
  int64_t results() const { return tiles() * side * side; }  // a channel, those past an image's edges among them
  int64_t splits() const { return (group_runs + block_runs - 1) / block_runs; }
  int64_t tasks() const { return (tiles() + block_tiles - 1) / block_tiles * conv.groups * splits(); }
};

// Result and source channels of a task of the weight's gradient: of tiles of 2 x 2, their sums take 256 KB.
constexpr int64_t kWinogradGradResults = 64, kWinogradGradChannels = 64;

// The gradient of the weight, out of the same tiles of the source and 2 x 2 tiles of the result's gradient.
struct WinogradGrad {
  TapGrad grad;         // its sums are of the form position_lanes; it has no blocks of rows and images
  WinogradConv source;  // what transforming a task's source channels takes: of its plan, the tiles
  int64_t scratch;

  int64_t blocks() const { return (source.tiles() + source.block_tiles - 1) / source.block_tiles; }
  int64_t tasks() const { return grad.tasks(); }
};

struct WinogradTileKernels {
  // Packs runs [begin, end) of the weight, products() * run_product elements each.
  void (*pack_weight[kNumDTypes])(const WinogradConv&, void* packed, int64_t begin, int64_t end);
  int64_t (*scratch[kNumDTypes])(const WinogradConv&);
  // Tasks [begin, end). False, at once, where a result is not finite: an infinity or NaN has then reached the other
  // results of its tile too, so that none of the call's results may be used.
  bool (*run[kNumDTypes])(const WinogradConv&, void* scratch, int64_t begin, int64_t end);
  int64_t (*grad_scratch[kNumDTypes])(const WinogradGrad&);
  bool (*run_grad[kNumDTypes])(const WinogradGrad&, void* scratch, int64_t begin, int64_t end);
};

struct WinogradKernels {
  int gemm_tiles;                  // tiles ...
  int gemm_results[2];             // ... and result channels of a register tile, for float64 and float32
  WinogradTileKernels of_side[2];  // 2 and 4
};

const WinogradKernels& winograd_kernels();

}  // namespace fastnn::cpu
