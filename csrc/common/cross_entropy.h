// A cross-entropy loss as its kernels see it, CPU and CUDA alike. Torch-free.
//
// A row is one prediction, a vector of `classes` logits. Logits, class probabilities and the gradient are
// (outer, classes, inner) arrays with row r = o * inner + i, in one of two layouts:
//   rows     inner is 1 and a row's classes are contiguous;
//   columns  the inner positions are contiguous, the class stride is anything.
// Whatever is a value a row (index, row_stats, loss, grad_rows) is contiguous. A is Accumulator<T>.
#pragma once

#include <cstdint>

namespace fastnn {

enum class Layout { kRows, kColumns };
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

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
  const void* weight;  // A [classes]; null is all ones (the CPU kernels take that only for kIndex)
  double keep;         // 1 - label_smoothing, what remains on the target
  double uniform;      // label_smoothing / classes, what every class gets
  // A [3][rows]: maximum logit; sum of e^(logit - maximum); total weight of the row's target, 0 if ignored.
  void* row_stats;
  void* loss;             // A [rows]; forward only
  const void* grad_rows;  // A [rows]: gradient of each row's loss, or a single one for all; backward only
  bool grad_per_row;
};

}  // namespace fastnn
