// fastnn._C: what was built and what is in use. The operators are not here: loading this library registers them as
// torch.ops.fastnn.*. They are also called from here, past the dispatcher (common/python_tensors.h, python_lists.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include "common/tensor_lists.h"
#include "common/torch_objects.h"
#include "cpu/bindings.h"
#include "cpu/isa.h"

namespace {

std::vector<std::string> names(const std::vector<fastnn::cpu::Isa>& isas) {
  std::vector<std::string> result;
  for (auto isa : isas) result.emplace_back(fastnn::cpu::isa_name(isa));
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace fastnn::cpu;
  m.doc() = "Build facts and the CPU instruction set in use.";
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;  // with its name
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  m.attr("torch_built_with") = FASTNN_TORCH_VERSION;
  m.def("built_isas", [] { return names(built_isas()); }, "Instruction sets compiled in, fastest first.");
  m.def("available_isas", [] { return names(available_isas()); }, "Those of them this machine runs.");
  m.def("isa", [] { return std::string(isa_name(current_isa())); }, "The instruction set in use.");
  m.def("set_isa", &set_current_isa, pybind11::arg("isa"), "Switch the whole process to another available one.");
  m.def("num_threads", [] { return torch::stable::get_num_threads(); }, "Threads a kernel uses at most.");
  pybind11::register_exception<fastnn::NotCovered>(m, "NotCovered", PyExc_RuntimeError);
  fastnn::bind_questions(m);
  bind_conv2d(m);
  bind_relu(m);
  bind_max_pool2d(m);
  bind_cross_entropy(m);
  bind_adam(m);
  bind_sgd(m);
  current_isa();  // a bad FASTNN_CPU_ISA fails the import, not the first kernel
}
