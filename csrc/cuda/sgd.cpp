// Glue of fastnn::sgd_ on CUDA devices.
#include "cuda/kernels/sgd.h"

#include "cuda/optimizers.h"

namespace fastnn::cuda {
namespace {

// List and OptionalTensor: of Tensor for the operator, of Python objects for fastnn.optim. Known: see views_of.
template <class List, class OptionalTensor, class Known>
void sgd_(List params, List grads, List momentum_buffer_list, std::vector<int64_t> first_steps, double lr,
          double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool lr_in_velocity,
          std::optional<double> grad_scale, OptionalTensor lr_tensor, OptionalTensor grad_scale_tensor,
          OptionalTensor found_inf, Known known) {
  const bool scaled = grad_scale.has_value() || grad_scale_tensor.has_value();
  Operands operands;
  const auto add = [&](const char* name, const List& list, bool updated) {
    operands.push_back({name, views_of(list, "sgd_", name, known), updated});
  };
  add("params", params, true);
  operands.push_back({"grads", views_of(grads, "sgd_", "grads"), scaled});  // new ones, mostly
  if (momentum != 0) add("momentum_buffer_list", momentum_buffer_list, true);
  check_operands("sgd_", kDevice, operands);
  std::vector<Momentum> modes(params.size(), momentum == 0 ? Momentum::kNone : Momentum::kOn);
  for (int64_t i : first_steps) {
    STD_TORCH_CHECK(momentum != 0 && i >= 0 && size_t(i) < modes.size(), "sgd_: first_steps has ", i,
                    ", expected indices of parameters with momentum");
    modes[i] = Momentum::kFirstStep;
  }
  if (modes.empty()) return;
  const View& param = operands[0].views[0];
  SgdOptions options{};
  options.lr = scalar_of(lr_tensor, lr, param, "sgd_", "lr_tensor");
  options.grad_scale = scalar_of(grad_scale_tensor, grad_scale.value_or(1), param, "sgd_", "grad_scale_tensor");
  options.found_inf = scalar_of(found_inf, 0, param, "sgd_", "found_inf");
  options.momentum = momentum;
  options.dampening = dampening;
  options.weight_decay = weight_decay;
  options.nesterov = nesterov;
  options.maximize = maximize;
  options.lr_in_velocity = lr_in_velocity;
  options.scaled = scaled;

  const List no_grads;
  const Writing<List> writing({&params, scaled ? &grads : &no_grads, &momentum_buffer_list});
  const DeviceOf device(param);
  in_batches(operands, [&](const Gathered& tensors) {
    for (const auto& [key, list] : grouped(tensors, operands.size(), [&](size_t i) { return modes[i]; }))
      check_launch("sgd_", launch_sgd(options, key.second, list, device.stream()));
  });
}

}  // namespace

void bind_sgd(pybind11::module_& m) {
  m.def("sgd_", &sgd_<pybind11::list, std::optional<pybind11::object>, pybind11::dict>);
}

void sgd_operator(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffer_list,
                  std::vector<int64_t> first_steps, double lr, double momentum, double dampening, double weight_decay,
                  bool nesterov, bool maximize, bool lr_in_velocity, std::optional<double> grad_scale,
                  std::optional<Tensor> lr_tensor, std::optional<Tensor> grad_scale_tensor,
                  std::optional<Tensor> found_inf) {
  sgd_(params, grads, momentum_buffer_list, first_steps, lr, momentum, dampening, weight_decay, nesterov, maximize,
       lr_in_velocity, grad_scale, lr_tensor, grad_scale_tensor, found_inf, NothingKnown{});
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) { m.impl("sgd_", TORCH_BOX(&sgd_operator)); }

}  // namespace fastnn::cuda
