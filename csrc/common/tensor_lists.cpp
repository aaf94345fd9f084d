#include "common/tensor_lists.h"

#include <algorithm>
#include <string>
#include <utility>

#include "common/strides.h"

namespace fastnn {
namespace {

constexpr ScalarType kScalarTypes[kNumDTypes] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16,
                                                 ScalarType::Half};

bool is_contiguous(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  int64_t expected = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

bool is_expanded(const View& view) {
  for (int64_t d = 0; d < view.dims; ++d)
    if (view.strides[d] == 0 && view.sizes[d] > 1) return true;
  return false;
}

std::string described(const View& view) {
  std::string text = std::string(torch::headeronly::toString(kScalarTypes[view.dtype])) + " [";
  for (int64_t d = 0; d < view.dims; ++d) text += (d ? ", " : "") + std::to_string(view.sizes[d]);
  return text + "]";
}

Tensor tensor_of(const View& view) {
  using torch::headeronly::DeviceType;
  const torch::stable::Device device(view.device == kCpuDevice ? DeviceType::CPU : DeviceType::CUDA,
                                     torch::stable::accelerator::DeviceIndex(view.device_index));
  return torch::stable::from_blob(view.data, {view.sizes, size_t(view.dims)}, {view.strides, size_t(view.dims)}, device,
                                  kScalarTypes[view.dtype]);
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

View::View(void* data, const int64_t* sizes, const int64_t* strides, int64_t dims, DType dtype, int32_t device,
           int32_t device_index)
    : data(static_cast<char*>(data)),
      sizes(sizes),
      strides(strides),
      dims(dims),
      count(1),
      dtype(dtype),
      device(device),
      device_index(device_index) {
  for (int64_t d = 0; d < dims; ++d) count *= sizes[d];
  contiguous = count == 0 || is_contiguous(sizes, strides, dims);
}

Views views_of(const std::vector<Tensor>& tensors, const char* op, const char* name) {
  Views views;
  views.reserve(tensors.size());
  for (const Tensor& tensor : tensors)
    views.emplace_back(tensor.data_ptr(), tensor.sizes().data(), tensor.strides().data(), tensor.dim(),
                       dtype_of(tensor, op, name), tensor.is_cpu() ? kCpuDevice : kCudaDevice,
                       tensor.is_cpu() ? 0 : tensor.get_device_index());
  return views;
}

Tensor empty_bytes(const View& beside, int64_t bytes) {
  return torch::stable::new_empty(tensor_of(beside), {bytes}, ScalarType::Byte);
}

void check_operands(const char* op, DeviceCode device, const Operands& operands) {
  const Views& params = operands[0].views;
  const auto refuse = [&](const Operand& operand, const std::string& what) {
    throw NotCovered(std::string(op) + ": " + operand.name + " has " + what);
  };
  for (const Operand& operand : operands) {
    if (operand.views.size() != params.size())
      refuse(operand, std::to_string(operand.views.size()) + " tensors, expected " + std::to_string(params.size()));
    const bool is_grads = &operand == &operands[1];
    for (size_t i = 0; i < params.size(); ++i) {
      const View &view = operand.views[i], &param = params[i];
      if (view.dtype != param.dtype || view.dims != param.dims ||
          !std::equal(view.sizes, view.sizes + view.dims, param.sizes))
        refuse(operand, described(view) + " beside a parameter that is " + described(param));
      if (view.device != device || view.device_index != param.device_index)
        refuse(operand, "a tensor on another device");
      // Gradients may be: see copy_back.
      if (operand.updated && !is_grads && !view.contiguous && is_expanded(view))
        refuse(operand, "elements that share memory");
    }
  }
}

bool share_memory(const Views& views) {
  std::vector<std::pair<const char*, const char*>> ranges;
  ranges.reserve(views.size());
  for (const View& view : views) {
    if (view.count == 0) continue;
    int64_t last = view.count - 1;
    if (!view.contiguous) {
      last = 0;
      for (int64_t d = 0; d < view.dims; ++d) last += (view.sizes[d] - 1) * view.strides[d];
    }
    ranges.emplace_back(view.data, view.data + (last + 1) * kElementSize[view.dtype]);
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].second) return true;
  return false;
}

Gathered::Gathered(const Operands& operands, size_t first, size_t last) : operands_(operands), first_(first) {
  data_.reserve((last - first) * operands.size());
  counts_.reserve(last - first);
  for (size_t i = first; i < last; ++i) {
    counts_.push_back(operands[0].views[i].count);
    bool contiguous = true;
    for (const Operand& operand : operands) {
      contiguous = contiguous && operand.views[i].contiguous;
      data_.push_back(operand.views[i].data);
    }
    if (contiguous) continue;
    char** data = &data_[data_.size() - operands.size()];
    const Tensor param = tensor_of(operands[0].views[i]);
    const Tensor order = is_dense(param) ? param : torch::stable::empty_like(param);
    for (const Operand& operand : operands) {
      const Tensor tensor = tensor_of(operand.views[i]);
      if (!same_strides(tensor, order)) {
        Tensor copy = torch::stable::empty_like(order);
        torch::stable::copy_(copy, tensor);
        *data = static_cast<char*>(copy.data_ptr());
        copies_.push_back({tensor, copy, operand.updated});
      }
      ++data;
    }
  }
}

void Gathered::scatter() const {
  for (const Copy& copy : copies_)
    if (copy.updated) copy_back(copy.original, copy.copy);
}

}  // namespace fastnn
