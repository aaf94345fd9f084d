// Interface of the CPU cross-entropy kernels; common/cross_entropy.h describes what they compute on.
#pragma once

#include <cstdint>

#include "common/cross_entropy.h"
#include "common/dtype.h"

namespace fastnn::cpu {

// A row of many classes is worked on in blocks of this many: small enough to be read twice with the second time from
// L1 or L2, and a unit of work for when there are fewer rows than threads.
constexpr int64_t kCrossEntropyBlock = 4096;
// Rows worked on side by side: positions of the columns layout, or whole rows of at most kCrossEntropyNarrow classes.
constexpr int64_t kCrossEntropyTile = 256;
constexpr int64_t kCrossEntropyNarrow = 32;

struct CrossEntropyKernels {
  // [begin, end) are rows; all of a row's blocks one after the other.
  void (*forward_rows[kNumDTypes][kNumCrossEntropyTargets])(const CrossEntropyArgs& args, int64_t begin, int64_t end);
  // The same in two steps, bit for bit: [begin, end) are blocks, row by row, each into four A of `partials`; then rows.
  void (*forward_blocks[kNumDTypes][kNumCrossEntropyTargets])(const CrossEntropyArgs& args, void* partials,
                                                              int64_t begin, int64_t end);
  void (*forward_merge[kNumDTypes][kNumCrossEntropyTargets])(const CrossEntropyArgs& args, const void* partials,
                                                             int64_t begin, int64_t end);
  // [begin, end) are tiles, each outer index having ceil(inner / kCrossEntropyTile).
  void (*forward_columns[kNumDTypes][kNumCrossEntropyTargets])(const CrossEntropyArgs& args, int64_t begin,
                                                               int64_t end);
  // [begin, end) are rows of the rows layout, of at most kCrossEntropyNarrow classes.
  void (*forward_narrow_rows[kNumDTypes][kNumCrossEntropyTargets])(const CrossEntropyArgs& args, int64_t begin,
                                                                   int64_t end);
  // [begin, end) are blocks, row by row.
  void (*backward_rows[kNumDTypes][kNumCrossEntropyTargets])(const CrossEntropyArgs& args, int64_t begin, int64_t end);
  // [begin, end) are tiles.
  void (*backward_columns[kNumDTypes][kNumCrossEntropyTargets])(const CrossEntropyArgs& args, int64_t begin,
                                                                int64_t end);
  // [begin, end) are rows of the rows layout, of at most kCrossEntropyNarrow classes.
  void (*backward_narrow_rows[kNumDTypes][kNumCrossEntropyTargets])(const CrossEntropyArgs& args, int64_t begin,
                                                                    int64_t end);
};

const CrossEntropyKernels& cross_entropy_kernels();

}  // namespace fastnn::cpu
