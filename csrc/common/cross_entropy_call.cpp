#include "common/cross_entropy_call.h"

namespace fastnn {
namespace {

int64_t class_dim(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }

// The one stride with which dims [begin, end), the class dimension left out, are walked in order; -1 if there is none.
int64_t common_stride(const Tensor& tensor, int64_t begin, int64_t end) {
  int64_t stride = 0, next = -1;
  for (int64_t d = end - 1; d >= begin; --d) {
    if (d == class_dim(tensor) || tensor.size(d) == 1) continue;
    if (next >= 0 && tensor.stride(d) != next) return -1;
    if (next < 0) stride = tensor.stride(d);
    next = tensor.stride(d) * tensor.size(d);
  }
  return stride;
}

// Whether the tensor is an array of this layout as it lies, and if so that array.
bool fits(const Tensor& tensor, Layout layout, ClassArray* array) {
  const int64_t cls = class_dim(tensor);
  const int64_t class_stride = tensor.size(cls) == 1 ? 1 : tensor.stride(cls);
  if (layout == Layout::kRows) {
    *array = {tensor.data_ptr(), common_stride(tensor, 0, tensor.dim()), 1};
    return class_stride == 1 && array->outer_stride >= 0;
  }
  // In two dimensions the batch is the inner one, and there is no outer one.
  const bool batched = tensor.dim() > 2;
  *array = {tensor.data_ptr(), batched ? tensor.stride(0) : 0, class_stride};
  return tensor.dim() > 1 && common_stride(tensor, batched ? 2 : 0, tensor.dim()) == 1;
}

// Finds the layout in which all operands lie, gathering those that have none.
void choose_layout_of_all(CrossEntropyCall& call) {
  auto& args = call.args;
  const bool has_probabilities = args.target == kProbabilities, has_grad = call.grad_input.has_value();
  for (Layout layout : {Layout::kRows, Layout::kColumns}) {
    if (!fits(call.logits, layout, &args.logits)) continue;
    if (has_grad && !fits(*call.grad_input, layout, &args.grad_input)) continue;
    if (has_probabilities && !fits(*call.probabilities, layout, &args.probabilities)) {
      Tensor gathered = torch::stable::empty_like(call.logits);
      if (!fits(gathered, layout, &args.probabilities)) continue;
      torch::stable::copy_(gathered, *call.probabilities);
      call.probabilities = gathered;
    }
    call.layout = layout;
    return;
  }
  call.logits = torch::stable::contiguous(call.logits);
  if (has_probabilities) call.probabilities = torch::stable::contiguous(*call.probabilities);
  if (has_grad) call.grad_input = torch::stable::empty_like(call.logits);
  choose_layout_of_all(call);  // contiguous tensors have one
}

}  // namespace

ScalarType accumulator_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::vector<int64_t> loss_shape(const Tensor& input) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < input.dim(); ++d)
    if (d != class_dim(input)) shape.push_back(input.size(d));
  return shape;
}

Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  const Tensor cast = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
}

CrossEntropyCall cross_entropy_call(const char* op, const Tensor& input, const Tensor& target,
                                    const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
                                    double label_smoothing) {
  dtype_of(input, op, "input");
  STD_TORCH_CHECK(input.dim() >= 1, op, ": input has no dimensions");
  STD_TORCH_CHECK(kNone <= reduction && reduction <= kSum, op, ": reduction is ", reduction, ", expected 0, 1 or 2");
  STD_TORCH_CHECK(!(label_smoothing > 1), op, ": label_smoothing is ", label_smoothing, ", expected at most 1");
  const double smoothing = label_smoothing > 0 ? label_smoothing : 0;
  const ScalarType target_dtype = target.scalar_type();
  const bool indexed = target_dtype == ScalarType::Long || target_dtype == ScalarType::Byte;

  CrossEntropyCall call{{}, {}, input, {}, {}, {}, {}};
  auto& args = call.args;
  args.target = !indexed ? kProbabilities : smoothing > 0 ? kSmoothedIndex : kIndex;
  args.classes = input.size(class_dim(input));
  args.rows = 1;
  for (int64_t size : loss_shape(input)) args.rows *= size;
  args.ignore_index = ignore_index;
  args.keep = 1 - smoothing;
  args.uniform = smoothing / double(args.classes);
  check_same_device(target, input, op, "target");
  if (indexed) {
    STD_TORCH_CHECK(target.numel() == args.rows, op, ": target has shape ", shape_string(target), ", expected ",
                    args.rows, " class indices for input ", shape_string(input));
    call.index = contiguous_as(target, ScalarType::Long);
    args.index = static_cast<const int64_t*>(call.index->data_ptr());
  } else {
    check_same_dtype(target, input, op, "target");
    check_same_shape(target, input, op, "target");
    call.probabilities = target;
  }
  if (weight) {
    check_same_device(*weight, input, op, "weight");
    check_same_dtype(*weight, input, op, "weight");
    STD_TORCH_CHECK(weight->dim() == 1 && weight->numel() == args.classes, op, ": weight has shape ",
                    shape_string(*weight), ", expected [", args.classes, "]");
    call.weight = contiguous_as(*weight, accumulator_dtype(input));
    args.weight = call.weight->data_ptr();
  }
  return call;
}

void check_cross_entropy_gradient(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                                  int64_t rows, int64_t reduction) {
  check_same_device(grad_output, input, op, "grad_output");
  check_same_device(stats, input, op, "stats");
  check_same_dtype(grad_output, input, op, "grad_output");
  STD_TORCH_CHECK(grad_output.numel() == (reduction == kNone ? rows : 1), op, ": grad_output has shape ",
                  shape_string(grad_output));
  STD_TORCH_CHECK(
      stats.numel() == 3 * rows + 1 && stats.scalar_type() == accumulator_dtype(input) && stats.is_contiguous(), op,
      ": stats is not what cross_entropy returned");
}

void choose_layout(CrossEntropyCall& call) {
  choose_layout_of_all(call);
  call.args.inner = call.layout == Layout::kRows ? 1
                    : call.logits.dim() == 2     ? call.args.rows
                                                 : call.args.rows / call.logits.size(0);
}

}  // namespace fastnn
