// fastnn._C_cuda: what was built. Loading it registers the CUDA kernels of torch.ops.fastnn.*; the optimizers' are also
// called from here, straight with Python lists (common/python_lists.h).
#include "cuda/optimizers.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "The CUDA kernels, and what they were built for.";
  m.attr("architectures") = FASTNN_CUDA_ARCHITECTURES;
  pybind11::register_local_exception<fastnn::NotCovered>(m, "NotCovered", PyExc_RuntimeError);
  fastnn::cuda::bind_adam(m);
  fastnn::cuda::bind_sgd(m);
}
