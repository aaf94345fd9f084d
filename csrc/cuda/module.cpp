// fastnn._C_cuda: loading it registers the CUDA kernels of torch.ops.fastnn.*.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "The CUDA kernels, and what they were built for.";
  m.attr("architectures") = FASTNN_CUDA_ARCHITECTURES;
}
