// Glue of fastnn::sgd_ on the CPU.
#include "cpu/kernels/sgd.h"

#include "cpu/tensor_lists.h"

namespace fastnn::cpu {
namespace {

void sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffer_list,
          std::vector<int64_t> first_steps, double lr, double momentum, double dampening, double weight_decay,
          bool nesterov, bool maximize, bool lr_in_velocity, std::optional<double> grad_scale) {
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
  Operands operands = {{"params", &params, true}, {"grads", &grads, options.scaled}};
  if (momentum != 0) operands.push_back({"momentum_buffer_list", &momentum_buffer_list, true});

  std::vector<Momentum> modes(params.size(), momentum == 0 ? Momentum::kNone : Momentum::kOn);
  for (int64_t i : first_steps) {
    STD_TORCH_CHECK(momentum != 0 && i >= 0 && size_t(i) < modes.size(), "sgd_: first_steps has ", i,
                    ", expected indices of parameters with momentum");
    modes[i] = Momentum::kFirstStep;
  }
  const auto kernel = sgd_kernels().update;
  fused_update(
      "sgd_", operands, [](size_t) {},
      [&](size_t i, DType dtype, void* const* data, int64_t count) { kernel[dtype](options, modes[i], data, count); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) { m.impl("sgd_", TORCH_BOX(&sgd_)); }

}  // namespace fastnn::cpu
