// What the glue of cross-entropy shares, CPU and CUDA alike: the checks of a call, and the layout its tensors lie in.
#pragma once

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/cross_entropy.h"

namespace fastnn {

ScalarType accumulator_dtype(const Tensor& input);
Tensor contiguous_as(const Tensor& tensor, ScalarType dtype);
// The shape of the unreduced loss.
std::vector<int64_t> loss_shape(const Tensor& input);

struct CrossEntropyCall {
  CrossEntropyArgs args;
  Layout layout;
  Tensor logits;  // args points into it and the others
  std::optional<Tensor> probabilities, grad_input, index, weight;
};

// Checks the arguments that forward and backward have in common, and fills in what `args` says of them.
CrossEntropyCall cross_entropy_call(const char* op, const Tensor& input, const Tensor& target,
                                    const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
                                    double label_smoothing);

// Checks what only backward takes.
void check_cross_entropy_gradient(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                                  int64_t rows, int64_t reduction);

// Finds the layout in which all operands lie, gathering those that have none; there has to be at least one row.
void choose_layout(CrossEntropyCall& call);

}  // namespace fastnn
