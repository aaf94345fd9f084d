// Glue of fastnn::relu, relu_ and relu_backward on the CPU.
#include "cpu/kernels/relu.h"

#include "common/check.h"
#include "common/python_tensors.h"
#include "common/strides.h"
#include "cpu/bindings.h"
#include "cpu/memory.h"

namespace fastnn::cpu {
namespace {

constexpr int64_t kGrain = 32 * 1024;  // elements a thread takes at the least: about 10 µs of memory traffic

void forward_into(const Tensor& x, const Tensor& y) {
  const auto kernel = relu_kernels().forward[dtype_of(x, "relu", "self")];
  const char* in = static_cast<const char*>(x.data_ptr());
  char* out = static_cast<char*>(y.data_ptr());
  const int64_t size = x.element_size();
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernel(in + begin * size, out + begin * size, end - begin);
  });
}

Tensor relu(Tensor self) {
  dtype_of(self, "relu", "self");
  const Tensor out = with_huge_pages(fresh_like(self));
  // empty_like keeps the strides of a dense input; any other input (expanded, sliced) is gathered first.
  const bool in_place_order = is_dense(self) && same_strides(self, out);
  if (!in_place_order) {
    Tensor target = out;
    torch::stable::copy_(target, self);
  }
  forward_into(in_place_order ? self : out, out);
  return out;
}

void relu_(Tensor self) {
  dtype_of(self, "relu_", "self");
  if (is_dense(self)) return forward_into(self, self);
  // Into its memory alone: copy_ into the tensor itself would count a version, which is the caller's to do.
  Tensor memory =
      torch::stable::from_blob(self.data_ptr(), self.sizes(), self.strides(), self.device(), self.scalar_type());
  torch::stable::copy_(memory, relu(self));
}

Tensor relu_backward(Tensor grad_output, Tensor result) {
  check_same_dtype(grad_output, result, "relu_backward", "grad_output");
  check_same_shape(grad_output, result, "relu_backward", "grad_output");
  const DType dtype = dtype_of(result, "relu_backward", "result");
  Tensor grad_input = with_huge_pages(fresh_like(result));
  const auto dense_like_grad_input = [&](const Tensor& tensor) {
    if (is_dense(tensor) && same_strides(tensor, grad_input)) return tensor;
    Tensor gathered = fresh_like(grad_input);
    torch::stable::copy_(gathered, tensor);
    return gathered;
  };
  const Tensor g = dense_like_grad_input(grad_output), y = dense_like_grad_input(result);
  const auto kernel = relu_kernels().backward[dtype];
  const char* g_data = static_cast<const char*>(g.data_ptr());
  const char* y_data = static_cast<const char*>(y.data_ptr());
  char* out = static_cast<char*>(grad_input.data_ptr());
  const int64_t size = result.element_size();
  torch::stable::parallel_for(0, result.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernel(g_data + begin * size, y_data + begin * size, out + begin * size, end - begin);
  });
  return grad_input;
}

}  // namespace

void bind_relu(pybind11::module_& m) {
  define_entry(m, "relu", &relu);
  define_entry(m, "relu_", &relu_);
  define_entry(m, "relu_backward", &relu_backward);
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("relu", TORCH_BOX(&relu));
  m.impl("relu_", TORCH_BOX(&relu_));
  m.impl("relu_backward", TORCH_BOX(&relu_backward));
}

}  // namespace fastnn::cpu
