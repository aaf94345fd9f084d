// Glue of fastnn::adam_ on the CPU.
#include <cmath>

#include "cpu/kernels/adam.h"
#include "cpu/tensor_lists.h"

namespace fastnn::cpu {
namespace {

// Adds 1 to a step counter and returns it.
double advance(const Tensor& step) {
  if (step.element_size() == sizeof(double)) return *static_cast<double*>(step.data_ptr()) += 1;
  return *static_cast<float*>(step.data_ptr()) += 1;
}

void adam_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> state_steps,
           double lr, double beta1, double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
           bool decoupled_weight_decay, std::optional<double> grad_scale) {
  const AdamOptions options{lr,
                            beta1,
                            beta2,
                            weight_decay,
                            eps,
                            maximize,
                            decoupled_weight_decay,
                            grad_scale.has_value(),
                            grad_scale.value_or(1)};
  Operands operands = {{"params", &params, true},
                       {"grads", &grads, options.scaled},
                       {"exp_avgs", &exp_avgs, true},
                       {"exp_avg_sqs", &exp_avg_sqs, true}};
  if (amsgrad) operands.push_back({"max_exp_avg_sqs", &max_exp_avg_sqs, true});
  STD_TORCH_CHECK(state_steps.size() == params.size(), "adam_: state_steps has ", state_steps.size(),
                  " tensors, expected ", params.size());
  for (const Tensor& step : state_steps) {
    const ScalarType dtype = step.scalar_type();
    STD_TORCH_CHECK(step.numel() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double),
                    "adam_: state_steps has a ", torch::headeronly::toString(dtype), " of shape ", shape_string(step),
                    ", expected a Float or Double scalar");
  }

  std::vector<AdamBias> biases(params.size());
  double last_step = 0;  // mostly all the parameters are at the same step
  AdamBias bias{};
  const auto prepare = [&](size_t i) {
    const double step = advance(state_steps[i]);
    if (step != last_step) bias = {lr / (1 - std::pow(beta1, step)), std::sqrt(1 - std::pow(beta2, step))};
    last_step = step;
    biases[i] = bias;
  };
  const auto* kernels = amsgrad ? adam_kernels().update_amsgrad : adam_kernels().update;
  fused_update("adam_", operands, prepare, [&](size_t i, DType dtype, void* const* data, int64_t count) {
    kernels[dtype](options, biases[i], data, count);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) { m.impl("adam_", TORCH_BOX(&adam_)); }

}  // namespace fastnn::cpu
