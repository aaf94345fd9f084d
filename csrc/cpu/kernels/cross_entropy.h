// Interface of the CPU cross-entropy kernels.
//
// A row is one prediction, a vector of `classes` logits. Logits, class probabilities and the gradient are
// (outer, classes, inner) arrays with row r = o * inner + i, in one of two layouts:
//   rows     inner is 1 and a row's classes are contiguous;
//   columns  the inner positions are contiguous, the class stride is anything.
// Whatever is a value a row (index, row_stats, loss, grad_rows) is contiguous. A is Accumulator<T>.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastnn::cpu {

struct ClassArray {
  void* data;
  int64_t outer_stride;
  int64_t class_stride;
};

// What the loss is taken against: the class of `index`; that, smoothed (a weight for every class); or probabilities.
enum CrossEntropyTarget : int { kIndex, kSmoothedIndex, kProbabilities, kNumCrossEntropyTargets };

struct CrossEntropyArgs {
  CrossEntropyTarget target;
  int64_t rows;
  int64_t classes;
  int64_t inner;
  ClassArray logits;         // T
  ClassArray probabilities;  // T; only for kProbabilities
  ClassArray grad_input;     // T; backward only
  const int64_t* index;      // each in [0, classes) or ignore_index; null for kProbabilities
  int64_t ignore_index;
  const void* weight;  // A [classes]; null is all ones, only for kIndex
  double keep;         // 1 - label_smoothing, what remains on the target
  double uniform;      // label_smoothing / classes, what every class gets
  // A [3][rows]: maximum logit; sum of e^(logit - maximum); total weight of the row's target, 0 if ignored.
  void* row_stats;
  void* loss;             // A [rows]; forward only
  const void* grad_rows;  // A [rows]: gradient of each row's loss, or a single one for all; backward only
  bool grad_per_row;
};

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
