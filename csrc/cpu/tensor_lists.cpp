#include "cpu/tensor_lists.h"

#include <utility>

#include "cpu/strides.h"

namespace fastnn::cpu {
namespace {

constexpr int64_t kElementSize[kNumDTypes] = {8, 4, 2, 2};

int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// dtype_of asks libtorch for a dozen dtype codes; a step over thousands of small tensors feels that.
DType dtype_from_code(int32_t code, const Tensor& tensor, const char* op, const char* name) {
  static const int32_t codes[kNumDTypes] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(),
                                            aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  for (int i = 0; i < kNumDTypes; ++i)
    if (codes[i] == code) return DType(i);
  return dtype_of(tensor, op, name);
}

bool is_expanded(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (strides[d] == 0 && sizes[d] > 1) return true;
  return false;
}

// copy_ refuses an expanded target; its elements that share memory are all alike, so the first of each is enough.
void copy_back(Tensor target, Tensor source) {
  for (int64_t d = 0; d < target.dim(); ++d)
    if (target.stride(d) == 0 && target.size(d) > 1) {
      target = torch::stable::narrow(target, d, 0, 1);
      source = torch::stable::narrow(source, d, 0, 1);
    }
  torch::stable::copy_(target, source);
}

}  // namespace

void check_operands(const char* op, const Operands& operands) {
  STD_TORCH_CHECK(operands.size() <= kMaxOperands, op, ": too many operands");
  const std::vector<Tensor>& params = *operands[0].tensors;
  for (const Operand& operand : operands)
    STD_TORCH_CHECK(operand.tensors->size() == params.size(), op, ": ", operand.name, " has ", operand.tensors->size(),
                    " tensors, expected ", params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const int32_t code = dtype_code(param);
    dtype_from_code(code, param, op, operands[0].name);
    const auto sizes = param.sizes();
    for (const Operand& operand : operands) {
      const Tensor& tensor = (*operand.tensors)[i];
      if (dtype_code(tensor) != code) check_same_dtype(tensor, param, op, operand.name);
      const auto other = tensor.sizes();
      if (other.size() != sizes.size() || !std::equal(sizes.begin(), sizes.end(), other.begin()))
        check_same_shape(tensor, param, op, operand.name);
      // Only the gradients, which come second, may be: see copy_back.
      if (operand.updated && operand.tensors != operands[1].tensors && !tensor.is_contiguous())
        STD_TORCH_CHECK(!is_expanded(tensor), op, ": ", operand.name, " has elements that share memory");
    }
  }
}

bool share_memory(const std::vector<Tensor>& tensors) {
  if (tensors.size() < 2) return false;
  std::vector<std::pair<const char*, const char*>> ranges;
  ranges.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    int64_t last = tensor.numel() - 1;
    if (!tensor.is_contiguous()) {
      const auto sizes = tensor.sizes(), strides = tensor.strides();
      last = 0;
      for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    }
    const char* begin = static_cast<const char*>(tensor.data_ptr());
    ranges.emplace_back(begin, begin + (last + 1) * int64_t(tensor.element_size()));
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].second) return true;
  return false;
}

Gathered::Gathered(const char* op, const Operands& operands, size_t first, size_t last)
    : operands_(operands), first_(first) {
  data_.reserve((last - first) * operands.size());
  ends_.reserve(last - first);
  dtypes_.reserve(last - first);
  element_sizes_.reserve(last - first);
  int64_t total = 0;
  for (size_t i = first; i < last; ++i) {
    const Tensor& param = (*operands[0].tensors)[i];
    total += param.numel();
    ends_.push_back(total);
    dtypes_.push_back(dtype_from_code(dtype_code(param), param, op, operands[0].name));
    element_sizes_.push_back(kElementSize[dtypes_.back()]);
    bool contiguous = true;
    for (const Operand& operand : operands) contiguous = contiguous && (*operand.tensors)[i].is_contiguous();
    if (contiguous) {
      for (const Operand& operand : operands) data_.push_back(static_cast<char*>((*operand.tensors)[i].data_ptr()));
      continue;
    }
    const Tensor order = is_dense(param) ? param : torch::stable::empty_like(param);
    for (const Operand& operand : operands) {
      Tensor tensor = (*operand.tensors)[i];
      if (!same_strides(tensor, order)) {
        Tensor copy = torch::stable::empty_like(order);
        torch::stable::copy_(copy, tensor);
        copies_.push_back({tensor, copy, operand.updated});
        tensor = copy;
      }
      data_.push_back(static_cast<char*>(tensor.data_ptr()));
    }
  }
}

void Gathered::scatter() const {
  for (const Copy& copy : copies_)
    if (copy.updated) copy_back(copy.original, copy.copy);
}

}  // namespace fastnn::cpu
