// What the optimizers' glue on CUDA devices shares: numbers that may lie in device memory, and tensors by dtype.
#pragma once

#include <map>

#include "common/python_lists.h"
#include "cuda/device.h"
#include "cuda/kernels/tensor_list.h"

namespace fastnn::cuda {

void bind_adam(pybind11::module_& m);
void bind_sgd(pybind11::module_& m);

// A tensor or none: for the operator, and for fastnn.optim.
inline Views one_view(const std::optional<Tensor>& tensor, const char* op, const char* name) {
  return tensor ? views_of(std::vector<Tensor>{*tensor}, op, name) : Views{};
}
inline Views one_view(const std::optional<pybind11::object>& tensor, const char* op, const char* name) {
  if (!tensor) return {};
  pybind11::list list;
  list.append(*tensor);
  return views_of(list, op, name);
}

// The number in a tensor of one element on the parameters' device, or `value` where there is no tensor.
template <class OptionalTensor>
Scalar scalar_of(const OptionalTensor& tensor, double value, const View& param, const char* op, const char* name) {
  const Views views = one_view(tensor, op, name);
  if (views.empty()) return {value, nullptr, kFloat64};
  const View& view = views[0];
  if (view.count != 1 || view.device != param.device || view.device_index != param.device_index)
    throw NotCovered(std::string(op) + ": " + name + " is no single element on the parameters' device");
  return {value, view.data, view.dtype};
}

// The tensors by what decides their kernel: the dtype and `mode(index)`.
template <class Mode>
auto grouped(const Gathered& tensors, size_t operands, const Mode& mode) {
  std::map<std::pair<DType, decltype(mode(size_t()))>, TensorList> groups;
  for (size_t i = 0; i < tensors.size(); ++i) {
    TensorList& list = groups[{tensors.dtype(i), mode(tensors.first() + i)}];
    list.dtype = tensors.dtype(i);
    list.data.insert(list.data.end(), tensors.data(i), tensors.data(i) + operands);
    list.counts.push_back(tensors.count(i));
    list.numbers.push_back(unsigned(tensors.first() + i));
  }
  return groups;
}

}  // namespace fastnn::cuda
