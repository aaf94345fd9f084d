// Glue of fastnn::sgd_ on the CPU.
#include "cpu/kernels/sgd.h"

#include "common/python_lists.h"
#include "cpu/optimizers.h"
#include "cpu/slices.h"

namespace fastnn::cpu {
namespace {

// List: std::vector<Tensor> for the operator, pybind11::list for fastnn.optim. Known: see views_of.
template <class List, class Known>
void sgd_(List params, List grads, List momentum_buffer_list, std::vector<int64_t> first_steps, double lr,
          double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool lr_in_velocity,
          std::optional<double> grad_scale, Known known) {
  SgdOptions options{};
  options.grad_factor = lr_in_velocity ? -lr : 1;
  options.step_factor = lr_in_velocity ? 1 : -lr;
  options.momentum = momentum;
  options.dampening = dampening;
  options.weight_decay = weight_decay;
  options.nesterov = nesterov;
  options.maximize = maximize;
  options.scaled = grad_scale.has_value();
  options.grad_scale = grad_scale.value_or(1);
  Operands operands;
  const auto add = [&](const char* name, const List& list, bool updated) {
    operands.push_back({name, views_of(list, "sgd_", name, known), updated});
  };
  add("params", params, true);
  operands.push_back({"grads", views_of(grads, "sgd_", "grads"), options.scaled});  // new ones, mostly
  if (momentum != 0) add("momentum_buffer_list", momentum_buffer_list, true);
  check_operands("sgd_", kCpuDevice, operands);

  std::vector<Momentum> modes(params.size(), momentum == 0 ? Momentum::kNone : Momentum::kOn);
  for (int64_t i : first_steps) {
    STD_TORCH_CHECK(momentum != 0 && i >= 0 && size_t(i) < modes.size(), "sgd_: first_steps has ", i,
                    ", expected indices of parameters with momentum");
    modes[i] = Momentum::kFirstStep;
  }
  const List no_grads;
  const Writing<List> writing({&params, options.scaled ? &grads : &no_grads, &momentum_buffer_list});
  const auto kernel = sgd_kernels().update;
  in_batches(operands, [&](const Gathered& tensors) {
    for_each_slice(tensors, operands.size(), [&](size_t i, DType dtype, void* const* data, int64_t count) {
      kernel[dtype](options, modes[i], data, count);
    });
  });
}

}  // namespace

void bind_sgd(pybind11::module_& m) { m.def("sgd_", &sgd_<pybind11::list, pybind11::dict>); }

void sgd_operator(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffer_list,
                  std::vector<int64_t> first_steps, double lr, double momentum, double dampening, double weight_decay,
                  bool nesterov, bool maximize, bool lr_in_velocity, std::optional<double> grad_scale,
                  std::optional<Tensor> lr_tensor, std::optional<Tensor> grad_scale_tensor,
                  std::optional<Tensor> found_inf) {
  lr = learning_rate("sgd_", lr, lr_tensor, grad_scale_tensor, found_inf);
  sgd_(params, grads, momentum_buffer_list, first_steps, lr, momentum, dampening, weight_decay, nesterov, maximize,
       lr_in_velocity, grad_scale, NothingKnown{});
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) { m.impl("sgd_", TORCH_BOX(&sgd_operator)); }

}  // namespace fastnn::cpu
