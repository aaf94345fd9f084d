// Glue of fastnn::adam_ on the CPU.
#include <cmath>

#include "common/python_lists.h"
#include "cpu/kernels/adam.h"
#include "cpu/optimizers.h"
#include "cpu/slices.h"

namespace fastnn::cpu {
namespace {

void check_steps(const Views& steps, size_t expected) {
  if (steps.size() != expected)
    throw NotCovered("adam_: state_steps has " + std::to_string(steps.size()) + " tensors, expected " +
                     std::to_string(expected));
  for (const View& step : steps)
    if (step.count != 1 || kElementSize[step.dtype] < 4 || step.device != kCpuDevice)
      throw NotCovered("adam_: state_steps has a tensor that is no float32 or float64 scalar on the CPU");
}

// Adds 1 to a step counter and returns it.
double advance(const View& step) {
  if (step.dtype == kFloat64) return *reinterpret_cast<double*>(step.data) += 1;
  return *reinterpret_cast<float*>(step.data) += 1;
}

// List: std::vector<Tensor> for the operator, pybind11::list for fastnn.optim. Known: see views_of.
template <class List, class Known>
void adam_(List params, List grads, List exp_avgs, List exp_avg_sqs, List max_exp_avg_sqs, List state_steps, double lr,
           double beta1, double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
           bool decoupled_weight_decay, std::optional<double> grad_scale, Known known) {
  const AdamOptions options{lr,
                            beta1,
                            beta2,
                            weight_decay,
                            eps,
                            maximize,
                            decoupled_weight_decay,
                            grad_scale.has_value(),
                            grad_scale.value_or(1)};
  Operands operands;
  const auto add = [&](const char* name, const List& list, bool updated) {
    operands.push_back({name, views_of(list, "adam_", name, known), updated});
  };
  add("params", params, true);
  operands.push_back({"grads", views_of(grads, "adam_", "grads"), options.scaled});  // new ones, mostly
  add("exp_avgs", exp_avgs, true);
  add("exp_avg_sqs", exp_avg_sqs, true);
  if (amsgrad) add("max_exp_avg_sqs", max_exp_avg_sqs, true);
  const Views steps = views_of(state_steps, "adam_", "state_steps", known);
  check_operands("adam_", kCpuDevice, operands);
  check_steps(steps, params.size());

  const List no_grads;
  const Writing<List> writing(
      {&params, options.scaled ? &grads : &no_grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &state_steps});
  std::vector<AdamBias> biases(params.size());
  double last_step = 0;  // mostly all the parameters are at the same step
  AdamBias bias{};
  const auto* kernels = amsgrad ? adam_kernels().update_amsgrad : adam_kernels().update;
  in_batches(operands, [&](const Gathered& tensors) {
    for (size_t i = tensors.first(); i < tensors.first() + tensors.size(); ++i) {
      const double step = advance(steps[i]);
      if (step != last_step) bias = {lr / (1 - std::pow(beta1, step)), std::sqrt(1 - std::pow(beta2, step))};
      last_step = step;
      biases[i] = bias;
    }
    for_each_slice(tensors, operands.size(), [&](size_t i, DType dtype, void* const* data, int64_t count) {
      kernels[dtype](options, biases[i], data, count);
    });
  });
}

}  // namespace

void bind_adam(pybind11::module_& m) { m.def("adam_", &adam_<pybind11::list, pybind11::dict>); }

void adam_operator(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs,
                   std::vector<Tensor> state_steps, double lr, double beta1, double beta2, double weight_decay,
                   double eps, bool amsgrad, bool maximize, bool decoupled_weight_decay,
                   std::optional<double> grad_scale, std::optional<Tensor> lr_tensor,
                   std::optional<Tensor> grad_scale_tensor, std::optional<Tensor> found_inf) {
  lr = learning_rate("adam_", lr, lr_tensor, grad_scale_tensor, found_inf);
  adam_(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, lr, beta1, beta2, weight_decay, eps,
        amsgrad, maximize, decoupled_weight_decay, grad_scale, NothingKnown{});
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) { m.impl("adam_", TORCH_BOX(&adam_operator)); }

}  // namespace fastnn::cpu
