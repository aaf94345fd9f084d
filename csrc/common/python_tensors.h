// An operator's entry past torch's dispatcher, for plain CPU tensors: pybind11 converts the arguments of its C++
// function. A tensor takes 0.2 µs there and back, through torch's own hand-over of handles; the dispatcher, its boxes
// and those of the stable ABI take 2 to 10 µs a call, several times what a small kernel does.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/tensor.h>

namespace fastnn {

// Throws NotCovered for what only the dispatcher can resolve: another device or layout, a subclass, a lazily negated
// tensor, one without memory of its own (functorch's).
torch::stable::Tensor tensor_of(pybind11::handle object);
pybind11::handle object_of(const torch::stable::Tensor& tensor);

// Without the GIL: autograd and other threads run beside a kernel.
template <class F>
void define_entry(pybind11::module_& m, const char* name, F* function) {
  m.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastnn

// Not by PYBIND11_TYPE_CASTER, which begins with a default tensor: two allocations an argument.
template <>
struct pybind11::detail::type_caster<torch::stable::Tensor> {
  static constexpr auto name = const_name("Tensor");
  template <class T>
  using cast_op_type = torch::stable::Tensor&&;
  std::optional<torch::stable::Tensor> value;

  operator torch::stable::Tensor&&() && { return *std::move(value); }
  bool load(handle object, bool) {
    value = fastnn::tensor_of(object);
    return true;
  }
  static handle cast(const torch::stable::Tensor& tensor, return_value_policy, handle) {
    return fastnn::object_of(tensor);
  }
};
